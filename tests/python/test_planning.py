"""Plans: predicted bytes are the bytes written, budgets are met, the choice is the best there is."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bitfold
from bitfold import Format, Plan
from bitfold.errors import ActivationError, BitfoldError, BudgetError, CoverageError, FormatError
from bitfold.io.shards import Checkpoint
from bitfold.outputs import Batch
from bitfold.planning.candidates import LADDER
from bitfold.planning.knapsack import solve


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of runs of tiny models: threads would cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Toy(nn.Module):
    """An embedding tied to a head, two blocks with fused projections, a convolution, a shared module."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.again = self.blocks[0].o_proj
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 200)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(self.again(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)
        self.o_proj = nn.Linear(64, 64, bias=False)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x)], -1)
        x = x + self.o_proj(a)
        return x + self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


def batches(count: int = 2) -> list[torch.Tensor]:
    return [torch.randint(0, 200, (2, 7)) for _ in range(count)]


def data_bytes(path: Path) -> int:
    with Checkpoint(path) as checkpoint:
        return sum(info.nbytes for info in checkpoint.tensors.values())


def file_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))


# What the file will weigh


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("nf4", {}),
        ("int4-g64", {"embeddings": None}),
        ("int8-row", {"skip": ["norm", "head"]}),
        (
            "int2-g32-fz-dq",
            {"embeddings": "int3-g64", "rules": {r".*\.o_proj": "nf4-nodq", "blocks.1.up_proj": None}},
        ),
        ("kmeans3", {}),
    ],
)
def test_predicted_bytes_of_plain_files_are_exact(tmp_path, fmt, options, tied):
    model = Toy(tied)
    plan = Plan.of(model, fmt, **options)
    folded = bitfold.quantize(copy.deepcopy(model), plan, progress=False)
    bitfold.save(folded, tmp_path / "model.safetensors")
    assert plan.data_bytes == data_bytes(tmp_path / "model.safetensors")
    assert plan.file_bytes == file_bytes(tmp_path / "model.safetensors")
    bitfold.save(model, tmp_path / "float.safetensors")
    assert plan.float_file_bytes == file_bytes(tmp_path / "float.safetensors")
    assert plan.ratio == plan.float_file_bytes / plan.file_bytes


def test_a_plan_folds_as_the_arguments_it_was_made_from():
    model = Toy()
    options = {"embeddings": "int8-row", "rules": {r".*\.o_proj": "int8-g64"}, "skip": ["blocks.0.up_proj"]}
    by_plan = bitfold.quantize(copy.deepcopy(model), Plan.of(model, "int4-g64", **options), progress=False)
    by_rules = bitfold.quantize(copy.deepcopy(model), "int4-g64", progress=False, **options)
    assert bitfold.manifest.describe(by_plan) == bitfold.manifest.describe(by_rules)
    for name, tensor in by_rules.state_dict().items():
        assert torch.equal(tensor, by_plan.state_dict()[name]), name


def test_plan_on_meta_and_of_half_folded_models():
    with torch.device("meta"):
        meta = Toy()
    plan = Plan.of(Toy(), "nf4")
    assert Plan.of(meta, "nf4").data_bytes == plan.data_bytes
    half = Toy()
    half.blocks[1] = bitfold.quantize(half.blocks[1], "nf4", progress=False)
    again = Plan.of(half, "nf4")
    assert (again.data_bytes, again.float_file_bytes) == (plan.data_bytes, plan.float_file_bytes)
    assert bitfold.summary(bitfold.quantize(half, plan, progress=False)).formats["nf4"] == len(plan) - 1


def test_plan_is_a_mapping_with_rules():
    plan = Plan.of(Toy(), "nf4", skip=["blocks.0.up_proj"])
    assert plan["embed"] == Format("int8-g64")
    assert plan["blocks.1.up_proj"] == Format("nf4")
    assert "head" not in plan  # tied to the embedding
    assert "blocks.0.up_proj" not in plan
    assert plan.rules["blocks.0.up_proj"] is None
    assert plan.default == "nf4"
    with pytest.raises(KeyError):
        plan["nothing"]
    with pytest.raises(AttributeError):
        plan.file_bytes = 3


def test_tables():
    plan = bitfold.plan(Toy(), 5.0, progress=False)
    text = str(plan)
    for part in ("blocks.0.q_proj", "with blocks.0.q_proj", "weights by bits", "x smaller", "next ratios"):
        assert part in text
    assert plan._repr_html_().count("<tr>") == len(plan) + 2
    assert repr(plan) == str(plan.table())


# JSON


def test_json_round_trip():
    model = Toy()
    plan = bitfold.plan(model, 6.0, calibration=batches(), sensitivity="output", progress=False)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.losses == plan.losses
    assert bitfold.plan(model, 6.0, sensitivity=again, progress=False).matrices == plan.matrices


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected JSON that Plan.to_json wrote"),
        ("[]", "expected JSON that Plan.to_json wrote"),
        ("{}", "bitfold_plan"),
        ('{"bitfold_plan": 7}', "version is 7"),
        ('{"bitfold_plan": 1, "matrices": [{"name": "a"}]}', "expected JSON"),
    ],
)
def test_bad_json(text, words):
    with pytest.raises(ValueError, match=words):
        Plan.from_json(text)


def test_json_with_a_bad_format():
    content = json.loads(Plan.of(Toy(), "nf4").to_json())
    content["matrices"][0]["format"] = "nf5"
    with pytest.raises(FormatError, match="nf5"):
        Plan.from_json(json.dumps(content))


# Budgets


@pytest.mark.parametrize("kind", ["weight", "output", "kl"])
@pytest.mark.parametrize("ratio", [4.2, 5.0, 6.5])
def test_budget_is_met_by_the_file(tmp_path, kind, ratio):
    model = Toy(tied=False)
    data = None if kind == "weight" else batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = bitfold.plan(model, ratio, calibration=data, sensitivity=kind, progress=False)
    assert plan.ratio >= ratio
    assert plan.measure == kind
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    bitfold.save(bitfold.quantize(model, plan, progress=False), tmp_path / "model.safetensors")
    assert file_bytes(tmp_path / "model.safetensors") == plan.file_bytes
    below, above = plan.next_ratio
    assert below is None or below < plan.ratio
    assert above is None or above > plan.ratio


def test_target_bytes_and_ends_of_the_range():
    model = Toy()
    largest = bitfold.plan(model, target_bytes=10**9, progress=False)
    assert {str(fmt) for fmt in largest.values()} == {"int8-row"}
    assert largest.next_ratio[0] is None
    smaller = bitfold.plan(model, target_bytes=largest.file_bytes - 1, progress=False)
    assert smaller.file_bytes < largest.file_bytes
    assert (
        bitfold.plan(model, target_bytes=largest.file_bytes, progress=False).file_bytes == largest.file_bytes
    )


def test_measured_losses_serve_a_model_on_meta():
    with torch.device("meta"):
        meta = Toy()
    with pytest.raises(ValueError, match="no values to measure"):
        bitfold.plan(meta, 5.0, progress=False)
    plan = bitfold.plan(Toy(), 5.0, progress=False)
    assert bitfold.plan(meta, 5.0, sensitivity=plan, progress=False) == plan


def test_more_bytes_never_lose_more():
    model = Toy()
    first = bitfold.plan(model, 4.0, progress=False)
    losses = []
    for ratio in (4.0, 5.0, 6.0, 7.0):
        plan = bitfold.plan(model, ratio, sensitivity=first, progress=False)
        losses.append(sum({m.group: m.loss for m in plan.matrices}.values()))
    assert losses == sorted(losses)


def test_fused_projections_take_one_choice():
    plan = bitfold.plan(Toy(), 6.0, progress=False)
    for block in ("blocks.0", "blocks.1"):
        assert len({str(plan[f"{block}.{name}"]) for name in ("q_proj", "k_proj", "v_proj")}) == 1
        assert plan[f"{block}.gate_proj"] == plan[f"{block}.up_proj"]
    assert "blocks.0.k_proj" not in plan.losses


def test_experts_of_one_layer_take_one_choice():
    model = nn.Module()
    model.experts = nn.ModuleList(Block() for _ in range(3))
    plan = bitfold.plan(model, 6.0, progress=False)
    assert len({m.group for m in plan.matrices}) == 4  # q with k and v, o, gate with up, down


def test_embeddings_rules_and_skip():
    model = Toy(tied=False)
    plan = bitfold.plan(
        model,
        3.0,
        embeddings="int8-g64",
        rules={"blocks.0.o_proj": "nf4-nodq"},
        skip=["head"],
        progress=False,
    )
    assert (plan["embed"], plan["blocks.0.o_proj"]) == (Format("int8-g64"), Format("nf4-nodq"))
    assert "head" not in plan
    assert plan.losses.get("embed") is None
    assert "embed" not in bitfold.plan(model, 2.0, embeddings=None, progress=False)


def test_embeddings_fall_below_four_bits_only_where_needed():
    model = Toy()
    loose = bitfold.plan(model, 5.5, progress=False)
    assert loose["embed"].bits >= 4
    assert not loose.notes
    tight = bitfold.plan(
        model, target_bytes=Plan.of(model, LADDER[0], embeddings=LADDER[0]).file_bytes, progress=False
    )
    assert tight["embed"].bits == 2
    assert "below 4 bits" in str(tight)


def test_formats_and_bits_are_obeyed():
    plan = bitfold.plan(Toy(), 4.5, formats=["int4-g128", "int8-row"], progress=False)
    assert {str(fmt) for fmt in plan.values()} <= {"int4-g128", "int8-row"}
    plan = bitfold.plan(Toy(), 4.5, min_bits=3, max_bits=4, progress=False)
    assert {fmt.bits for fmt in plan.values()} <= {3, 4}


# Errors


def test_infeasible_budget_names_the_smallest_and_what_takes_it():
    model = Toy()
    with pytest.raises(BudgetError, match=r"smallest choice takes [\d,]+ bytes \(.*x\).*embed") as caught:
        bitfold.plan(model, 100.0, progress=False)
    assert isinstance(caught.value, BitfoldError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(BudgetError, match=r"embed\.weight \(float\)"):
        bitfold.plan(model, 8.0, embeddings=None, progress=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "neither"),
        ({"target_ratio": 4.0, "target_bytes": 3}, "both"),
        ({"target_ratio": -1.0}, "positive"),
        ({"target_ratio": float("nan")}, "positive"),
        ({"target_ratio": 4.0, "min_bits": 5, "max_bits": 4}, "no format of 5 to 4 bits"),
        ({"target_ratio": 4.0, "formats": ["nf9"]}, "nf9"),
        ({"target_ratio": 4.0, "sensitivity": "guess"}, "'guess'"),
        ({"target_ratio": 4.0, "sensitivity": "kl"}, "calibration"),
        ({"target_ratio": 4.0, "calibration": []}, "the data is empty"),
        ({"target_ratio": 4.0, "skip": ["no.such"]}, "no.such"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        bitfold.plan(Toy(), progress=False, **arguments)


def test_texts_are_read_as_quantize_reads_them():
    model, texts = Toy(), ["a bc def", "ghij", "klmno pq", "r"]
    encode = lambda text: [ord(letter) % 100 for letter in text]  # noqa: E731

    def losses(calibration, **others):
        arguments = {"sensitivity": "output", "progress": False, **others}
        return bitfold.plan(model, 5.0, calibration=calibration, **arguments).losses

    of_texts = losses(texts, tokenizer=encode)
    assert of_texts == losses([encode(text) for text in texts])
    settings = bitfold.calibration.Settings(sequence_length=3)
    assert of_texts != losses(texts, tokenizer=encode, settings=settings)


def test_wrong_calibration_and_coverage():
    with pytest.raises(ValueError, match="does not say where its tokenizer is"):
        bitfold.plan(Toy(), 4.0, calibration="text", progress=False)
    with pytest.raises(ValueError, match=r"item 1: expected a text, token ids, .* got NoneType"):
        bitfold.plan(Toy(), 4.0, calibration=[[1, 2], None], progress=False)
    with pytest.raises(CoverageError):
        bitfold.plan(nn.Sequential(nn.Linear(64, 64), nn.Conv1d(64, 64, 3)), 4.0, progress=False)
    with pytest.raises(ValueError, match="no matrix to fold"):
        bitfold.plan(nn.Sequential(nn.LayerNorm(8)), 4.0, progress=False)


def test_non_finite_activations_are_named_and_weights_are_restored():
    model = Toy()
    model.norm.weight.data[0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    for kind in ("kl", "output"):
        with pytest.raises(ActivationError, match="NaN or Inf"):
            bitfold.plan(model, 4.0, calibration=batches(), sensitivity=kind, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_plan_for_another_model_is_refused():
    plan = Plan.of(Toy(), "nf4")
    other = Toy()
    other.blocks[1].down_proj = nn.Linear(96, 128)
    with pytest.raises(ValueError, match=r"blocks\.1\.down_proj: the plan is for \[64, 96\]"):
        bitfold.quantize(other, plan, progress=False)
    other = Toy()
    other.extra = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="extra: not in the plan"):
        bitfold.quantize(other, plan, progress=False)
    with pytest.raises(ValueError, match="matches no module"):
        bitfold.quantize(Toy().blocks[0], plan, progress=False)
    with pytest.raises(ValueError, match="skip and rules belong to the making"):
        bitfold.quantize(Toy(), plan, skip=["head"], progress=False)


# The choice


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 60), st.integers(0, 50)), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 200),
)
def test_the_choice_is_the_best_there_is(options, budget):
    def value(pick):
        parts = [group[i] for group, i in zip(options, pick, strict=True)]
        return sum(size for size, _ in parts), sum(loss for _, loss in parts)

    every = [value(pick) for pick in itertools.product(*(range(len(group)) for group in options))]
    fitting = [loss for size, loss in every if size <= budget]
    found = solve(options, budget)
    if not fitting:
        assert found is None
    else:
        size, loss = value(found)
        assert size <= budget
        assert loss == min(fitting)


def test_a_thinned_choice_stays_close_to_the_best():
    random = torch.Generator().manual_seed(1)
    sizes = torch.randint(1000, 2000, (60, 1), generator=random) * torch.tensor([2, 3, 4, 8]) + torch.randint(
        0, 97, (60, 4), generator=random
    )
    losses = torch.rand(60, 1, generator=random) * torch.tensor([0.1, 0.03, 0.008, 0.0001])
    options = [
        list(zip(s.tolist(), loss.tolist(), strict=True)) for s, loss in zip(sizes, losses, strict=True)
    ]
    budget = int(sizes[:, 1].sum())

    def total(states):
        found = solve(options, budget, states)
        assert sum(options[i][j][0] for i, j in enumerate(found)) <= budget
        return sum(options[i][j][1] for i, j in enumerate(found))

    fine = total(1 << 17)
    assert fine <= total(8192) <= 1.001 * fine


@pytest.mark.parametrize("kind", ["output", "kl"])
def test_a_sensitive_layer_is_told_by_data(kind):
    """One layer sees only those columns whose weights are smallest, so its outputs are mostly error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[:, :8] *= 0.1
        model[0].weight[8:] = 0  # layer 1 sees its first eight columns only
        model[0].bias.zero_()
        for layer in model[1:]:
            layer.bias.zero_()
    data = [torch.randn(32, 64) for _ in range(2)]
    plan = bitfold.plan(model, 5.0, calibration=data, sensitivity=kind, progress=False)
    at_four = {name: losses["nf4"] for name, losses in plan.losses.items()}
    assert at_four["1"] > 10 * max(at_four["0"], at_four["2"])
    assert plan["1"].bits > plan["0"].bits


class Idle(nn.Module):
    """A layer that is called, and one that is not."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("kind", ["output", "kl"])
def test_layers_that_the_data_do_not_reach_are_judged_by_their_weights(kind):
    data = [torch.randn(40, 64)]
    made = bitfold.plan(Idle(), 5.0, calibration=data, sensitivity=kind, progress=False)
    assert all(loss > 0 for loss in made.losses["idle"].values())
    assert any("idle" in note for note in made.notes)


def test_auto_takes_what_there_is():
    assert bitfold.plan(Toy(), 5.0, progress=False).measure == "weight"
    assert bitfold.plan(Toy(), 5.0, calibration=batches(), progress=False).measure == "kl"
    model = Toy()
    with torch.device("meta"):
        model.embed = nn.Embedding(50_000, 64)
    from bitfold.planning import budget
    from bitfold.planning.sensitivity import choose_measure

    groups = [budget.Group("a", [0], [Format("nf4"), Format("int8-row")])]
    many = [Batch(args=(torch.zeros(1000, 1000, dtype=torch.int64),))]
    assert choose_measure(model, groups, many) == "output"


# transformers


def tiny(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            max_position_embeddings=32,
        )  # fmt: skip
        return transformers.BertForMaskedLM(config).eval()
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=32)
        ).eval()
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=99,
                d_model=64,
                d_kv=16,
                d_ff=96,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ).eval()
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, tie_word_embeddings=kind == "tied-llama",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["bert", "llama", "tied-llama", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget_on_saved_directories(tmp_path, kind, dtype):
    model = tiny(kind).to(dtype)
    model.save_pretrained(tmp_path / "float")
    ids = {"input_ids": torch.randint(0, 99, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    if kind == "t5":
        ids["labels"] = ids["input_ids"]
    target = int(file_bytes(tmp_path / "float") / (4.0 if dtype == torch.float32 else 2.1))
    plan = bitfold.plan(model, target_bytes=target, calibration=[ids], progress=False)
    assert plan.float_file_bytes == file_bytes(tmp_path / "float")
    assert plan.measure == "kl"
    bitfold.quantize(model, plan, progress=False).save_pretrained(tmp_path / "folded")
    assert plan.data_bytes == data_bytes(tmp_path / "folded")
    assert plan.file_bytes == file_bytes(tmp_path / "folded") <= target
    assert len(bitfold.summary(bitfold.load(tmp_path / "folded")).weights_by_bits) >= 1


def test_summary_shows_the_distribution_of_bits():
    model = bitfold.quantize(Toy(), Plan.of(Toy(), "nf4"), progress=False)
    summary = bitfold.summary(model)
    assert summary.weights_by_bits == {
        8: 200 * 64,
        4: sum(p.numel() for p in Toy().blocks.parameters() if p.ndim == 2),
    }
    assert "folded weights by bits: 4-bit" in str(summary)
    assert summary.to_dict()["weights_by_bits"]["8"] == 200 * 64
