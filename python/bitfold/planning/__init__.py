"""Plans: which matrix gets which Format, and what the file will weigh, before anything is folded.

`plans.py` holds `Plan` itself; `budget.py` the function `bitfold.plan`, which chooses formats for a budget of
bytes from `candidates.py` (what there is to choose from), `sensitivity.py` (what each choice costs in
accuracy) and `knapsack.py` (the best choice that fits); `file_bytes.py` knows the file beforehand.
"""

from bitfold.planning.budget import plan
from bitfold.planning.plans import Plan, PlannedMatrix

__all__ = ["Plan", "PlannedMatrix", "plan"]
