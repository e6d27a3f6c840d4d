"""The door to HuggingFace: registration with transformers, loading, saving, model cards.

Importing this package imports neither transformers nor PEFT. `registration.install` is called by
`import bitfold` and hooks in when they come; everything else imports them where it is used.
"""
