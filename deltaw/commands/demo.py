"""The demo's run: letters -> phonemes, SmolLM2-135M-Instruct, CMUdict.

A task that the base can't do at all (its phoneme error rate is above 1), that is easy to check, and that takes
minutes on two cores: a word is about 17 tokens. `recipes/demo.yaml` is
this dictionary as a file; a test holds them equal.
"""

from typing import Any

DEMO: dict[str, Any] = {
    "base": "builtin:smollm2-135m",
    "adapter": {"rank": 16, "alpha": 32, "targets": "all-linear"},
    "data": {"train": "builtin:cmudict", "eval": 500, "limit": 5500},
    "train": {"lr": 2e-3, "tokens_per_step": 768, "tokens_per_batch": 768, "sample_every": 40},
    "evaluate": {"metrics": ["phoneme_error_rate", "exact_match"], "max_new_tokens": 20},
    "output": "runs/demo",
}
