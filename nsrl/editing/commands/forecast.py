"""`nsrl forecast`: what fine-tuning on new texts would cost old ones, before any training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nsrl.editing.commands.config import ForecastConfig
from nsrl.editing.commands.texts import read_texts
from nsrl.editing.models import load_model
from nsrl.editing.post_training.forecast import Calibration, TokenForecast, forecast_cost
from nsrl.editing.tokens import check_tokenizer, longest, padded
from nsrl.errors import NsrlError
from nsrl.files import given_path
from nsrl.reading.documents import read_results


def forecast_texts(config: ForecastConfig, told: Callable[[str], None] = lambda _: None) -> TokenForecast:
    """Forecast the KL on old texts, in nats a token, from the first step that an optimizer would make on new ones.

    Args:
        config: the settings.
        told: called with how far it is.

    Raises:
        NsrlError: too few new texts for two batches, or as `read_texts`, `load_model` and `forecast_cost`.
    """
    old, new = read_texts(config.preserve), read_texts(config.new)
    if len(new) < config.batch_size + 1:
        raise NsrlError(
            f"{config.new} has {len(new)} texts, which make no two batches of {config.batch_size}; give more of them, "
            "or a smaller --batch_size"
        )
    told("loading the model")
    model, tokenizer = load_model(config.model, config.device)
    check_tokenizer(tokenizer)
    device, length = next(model.parameters()).device, longest(model, config.max_tokens)

    def batches(texts: list[str]) -> list[dict[str, Tensor]]:
        rows = [tokenizer(text)["input_ids"][:length] for text in texts]
        parts = [rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size)]
        found = [padded(part, tokenizer.pad_token_id, device) for part in parts]
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask in found]

    told(f"the first step on {len(new)} new texts against {len(old)} old ones")
    return forecast_cost(
        model,
        batches(old),
        batches(new),
        _loss,
        learning_rate=config.learning_rate,
        steps=config.steps,
        optimizer=config.optimizer,
    )


def read_calibration(name: str) -> Calibration:
    """The calibration in a file of results.

    Raises:
        NsrlError: there is no such file, or no calibration in it.
    """
    told = read_results(given_path(name), f"cannot read the calibration of {name}")["calibration"]
    try:
        numbers = {field.name: float(told[field.name]) for field in fields(Calibration)}
    except (TypeError, KeyError, ValueError) as error:
        raise NsrlError(f"{name} holds no calibration; nsrl bench post_training_forecast leaves one") from error
    runs = int(numbers.pop("runs"))
    return Calibration(runs=runs, **numbers)


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch, use_cache=False).logits[:, :-1]
    wanted = batch["attention_mask"][:, 1:].bool()
    return F.cross_entropy(logits[wanted].float(), batch["input_ids"][:, 1:][wanted])
