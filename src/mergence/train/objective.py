"""What a step minimises: the labels, and closeness to the dense model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergence.distances import kl_divergence
from mergence.errors import OptionError, UnsupportedModelError
from mergence.outputs import answer
from mergence.train.config import Config
from mergence.train.levels import Choice, Reducer

CONFIDENT = 0.4
"""Probability of the right class from which on a class token is held to the dense one (MCTF)."""


class Objective:
    """The loss of a batch, with a teacher where the configuration asks for it.

    `label_loss` times the cross entropy with the labels; 0 leaves everything to the teacher (Hinton
    et al., arXiv 1503.02531). Few images that the model has seen in its training teach it little by
    their labels and much by its own dense answers.

    A teacher that is fixed (`mergence.train.teacher`), or the same weights at this moment without
    reduction, as in MCTF (arXiv 2403.10030), adds

    * `distill` times the divergence of the answer from the teacher's, at a temperature;
    * `consistency` times the squared distance of the class token, before the classifier, from the
      teacher's, for images whose right class has a probability above 0.4 (MCTF, with weight 3;
      there the teacher is reduced a little, too);
    * `dense_loss` times the cross entropy of the dense path itself, so that it stays as good as the
      reduced one (MCTF, with weight 1); this path is the teacher of the other two.

    In a dense step the model's own dense path is what is trained: it is not its own teacher there,
    and its cross entropy has both weights, `label_loss` and `dense_loss`.

    Args:
        config: Weights of the parts.
        model: The model, before it is wrapped.
        reducer: What lets it follow a choice.
        teacher: Who is learned from besides the labels; None is the model's own dense path.

    Raises:
        OptionError: There is nothing to learn from, or the teacher's class token is of another
            length.
        UnsupportedModelError: A class token cannot be found.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        reducer: Reducer,
        teacher: nn.Module | None = None,
    ) -> None:
        self.config = config
        self.reducer = reducer
        self.taught = bool(config.distill or config.consistency or config.dense_loss)
        if not self.taught and not config.label_loss:
            raise OptionError(
                "Nothing is left to learn from: label_loss is 0, and so are distill, consistency "
                "and dense_loss. Give distill 1 to learn from the dense model alone."
            )
        self.teacher = teacher
        self.token = self.teacher_token = None
        if config.consistency:
            self.token = self.teacher_token = _ClassifierInput(model)
            if teacher is not None:
                self.teacher_token = _ClassifierInput(teacher)
            if self.teacher_token.width != self.token.width:
                raise OptionError(
                    f"The class token of the teacher '{config.teacher}' has "
                    f"{self.teacher_token.width} numbers and the model's {self.token.width}, so "
                    "they have no distance. Leave out consistency; distill compares answers."
                )

    def __call__(self, model: nn.Module, x: Tensor, soft: Tensor, choice: Choice) -> Tensor:
        """Losses of each image.

        Args:
            model: The model, perhaps wrapped; it follows `choice` afterwards.
            x: `[B, C, H, W]` images.
            soft: `[B, K]` distribution of each one's classes.
            choice: The reduction of this step.

        Returns:
            `[B]`.
        """
        config = self.config
        # In a dense step the model would be its own teacher.
        taught = self.taught and (self.teacher is not None or choice.strength > 0)
        dense, dense_token = self._dense(model, x) if taught else (None, None)
        self.reducer.select(choice)
        logits = answer(model(x)).float()
        labels = _cross_entropy(logits, soft)
        if dense is None:  # in a dense step this is the dense path, too
            return (config.label_loss + config.dense_loss) * labels
        loss = config.label_loss * labels
        if config.dense_loss:
            loss = loss + config.dense_loss * _cross_entropy(dense, soft)
        t, fixed = config.temperature, dense.detach()
        if config.distill:
            loss = loss + config.distill * t**2 * kl_divergence(fixed / t, logits / t)
        if self.token is not None and dense_token is not None:
            sure = (soft * logits.detach().softmax(dim=1)).sum(dim=1) > CONFIDENT
            distance = F.mse_loss(self.token.seen(), dense_token.detach(), reduction="none")
            loss = loss + config.consistency * sure * distance.flatten(1).mean(dim=1)
        return loss

    def _dense(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The teacher's logits and class tokens; with a gradient only for the dense loss."""
        self.reducer.select(Choice(next(iter(self.reducer.programs)), 0.0))
        with torch.set_grad_enabled(bool(self.config.dense_loss)):
            logits = answer((self.teacher or model)(x)).float()
        return logits, None if self.teacher_token is None else self.teacher_token.seen()


class _ClassifierInput:
    """What goes into a model's classifier: the class token, or what is pooled in its place."""

    def __init__(self, model: nn.Module) -> None:
        head: Any = getattr(model, "get_classifier", lambda: None)()
        head = head[0] if isinstance(head, tuple) else head
        if head is None:
            linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
            head = linear[-1] if linear else None
        if not isinstance(head, nn.Linear):
            raise UnsupportedModelError(
                f"The classifier of this {type(model).__name__} is no linear layer, so consistency "
                "of the class token cannot be asked for. Leave it out; distill needs no token."
            )
        self.width = head.in_features
        self._last: Tensor | None = None
        head.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._last = arguments[0].float()

    def seen(self) -> Tensor:
        """`[B, C]` of the last forward."""
        if self._last is None:
            raise RuntimeError("The classifier has not run yet.")
        last, self._last = self._last, None
        return last


def _cross_entropy(logits: Tensor, soft: Tensor) -> Tensor:
    return F.cross_entropy(logits, soft, reduction="none")
