"""The losses of preference learning, each a frozen model of its options; all of them from log-probabilities of answers.

Below, h is an answer's log-probability minus the reference model's, y the chosen answer, y' the rejected one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, Strict

from trainworks.config import Settings
from trainworks.settings import Rate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DPO", "IPO", "KTO", "ORPO", "Answers", "Objective", "SimPO"]

Positive = Annotated[float, Strict(), Field(gt=0)]


class Answers(NamedTuple):
    """What is known of the answers of some rows, each [answers of a row, rows]: chosen before rejected."""

    logps: Tensor
    """Log-probability of the answer, summed over its tokens, in nats."""
    tokens: Tensor
    """How many tokens that is; at least one."""
    desirable: Tensor
    """Whether the answer is wanted."""
    reference: Tensor | None = None
    """The reference model's log-probability of it."""
    drift: Tensor | None = None
    """How far the model is from its reference, [1]: the mean h of answers to other prompts, at least 0."""

    @property
    def ratios(self) -> Tensor:
        """Log-probability minus the reference model's."""
        assert self.reference is not None, "rows are annotated for the objectives that have a reference"
        return self.logps - self.reference


class Objective(Settings, ABC):
    """A loss of rows from their answers' log-probabilities."""

    type: str
    """The YAML tag."""
    has_reference: ClassVar[bool] = True
    """Whether it compares with the model before training."""
    couples: ClassVar[bool] = False
    """Whether it takes the drift, to which all rows of a step belong."""
    takes_single: ClassVar[bool] = False
    """Whether rows of one answer with a label will do."""

    @abstractmethod
    def losses(self, answers: Answers) -> Tensor:
        """Return each row's loss, [rows]."""

    @abstractmethod
    def rewards(self, answers: Answers) -> Tensor:
        """Return each answer's reward, [answers, rows]; the loss prefers answers by it."""

    def counts(self, desirable: Tensor) -> Tensor:
        """Return what each row's loss is the sum of, [rows]: one comparison."""
        import torch

        return torch.ones(desirable.shape[1], device=desirable.device)


class DPO(Objective):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290): -log sigmoid(beta (h(y) - h(y')))."""

    type: Literal["dpo"] = "dpo"
    beta: Positive = 0.1
    """How closely the model is kept to its reference: the larger, the closer."""
    label_smoothing: Annotated[float, Strict(), Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs taken to be the wrong way round (conservative DPO, Mitchell 2023)."""

    def losses(self, answers: Answers) -> Tensor:
        """Return -(1 - e) log sigmoid(m) - e log sigmoid(-m) of the margin m and the label smoothing e."""
        from torch.nn.functional import logsigmoid

        margin = _margin(self.rewards(answers))
        return -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)

    def rewards(self, answers: Answers) -> Tensor:
        """Return beta h."""
        return self.beta * answers.ratios


class IPO(Objective):
    """Identity preference optimization (Azar et al. 2023, arXiv:2310.12036, eq. 17): (h(y) - h(y') - 1 / (2 beta))^2.

    h is the mean over the answer's tokens, as its authors have it in their experiments, and TRL after them.
    """

    type: Literal["ipo"] = "ipo"
    beta: Positive = 0.1
    """The paper's tau: 1 / (2 beta) is the margin that is aimed at."""

    def losses(self, answers: Answers) -> Tensor:
        """Return the squared distance of the margin from the one that is aimed at."""
        return (_margin(answers.ratios / answers.tokens) - 1 / (2 * self.beta)) ** 2

    def rewards(self, answers: Answers) -> Tensor:
        """Return beta times the mean of h over the tokens."""
        return self.beta * answers.ratios / answers.tokens


class SimPO(Objective):
    """Simple preference optimization (Meng et al. 2024, arXiv:2405.14734, eq. 6), without a reference:
    -log sigmoid(r(y) - r(y') - gamma), r being beta times the mean log-probability of a token."""

    type: Literal["simpo"] = "simpo"
    has_reference: ClassVar[bool] = False
    beta: Positive = 2.0
    """Scale of the rewards."""
    gamma: Rate = 1.0
    """Margin of the rewards that is aimed at; the paper takes 0.3 to 0.8 of beta."""

    def losses(self, answers: Answers) -> Tensor:
        """Return -log sigmoid of the margin above gamma."""
        from torch.nn.functional import logsigmoid

        return -logsigmoid(_margin(self.rewards(answers)) - self.gamma)

    def rewards(self, answers: Answers) -> Tensor:
        """Return beta times the mean log-probability of a token."""
        return self.beta * answers.logps / answers.tokens


class ORPO(Objective):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7), without a reference: the
    chosen answer's mean negative log-likelihood, minus the weighted log sigmoid of the log odds ratio.

    The likelihood is that of the answer's tokens, a mean by row; TRL takes the prompt's too, a mean over the batch.
    """

    type: Literal["orpo"] = "orpo"
    has_reference: ClassVar[bool] = False
    odds_weight: Rate = 0.1
    """The paper's lambda: weight of the odds ratio beside the likelihood."""

    def losses(self, answers: Answers) -> Tensor:
        """Return likelihood and odds ratio together."""
        from torch.nn.functional import logsigmoid

        likelihood = answers.logps[0] / answers.tokens[0]
        return -likelihood - self.odds_weight * logsigmoid(_margin(self.rewards(answers)))

    def rewards(self, answers: Answers) -> Tensor:
        """Return the log odds p / (1 - p) of the geometric mean p of the tokens' probabilities."""
        mean = (answers.logps / answers.tokens).clamp(max=-1e-7)  # a probability of one has no odds
        return mean - (-mean.expm1()).log()


class KTO(Objective):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8), of answers that are wanted or
    not: weight (1 - sigmoid(beta (h - z))) for the former, weight (1 - sigmoid(beta (z - h))) for the latter.

    z is the mean h of prompts with the answers of other rows, over all rows of an optimizer step, and at least 0. The
    paper takes the mean over a micro-batch; here it does not depend on how a step is cut up. A pair counts as two
    answers.
    """

    type: Literal["kto"] = "kto"
    couples: ClassVar[bool] = True
    takes_single: ClassVar[bool] = True
    beta: Positive = 0.1
    """How closely the model is kept to its reference: the larger, the closer."""
    desirable_weight: Rate = 1.0
    """Weight of answers that are wanted."""
    undesirable_weight: Rate = 1.0
    """Weight of those that are not. Weight times number of both kinds should be in a proportion of 1 to 4/3."""

    def losses(self, answers: Answers) -> Tensor:
        """Return the sum over the row's answers."""
        import torch

        rewards = self.rewards(answers)
        wanted = self.desirable_weight * (1 - torch.sigmoid(rewards))
        unwanted = self.undesirable_weight * (1 - torch.sigmoid(-rewards))
        losses: Tensor = torch.where(answers.desirable, wanted, unwanted).sum(0)
        return losses

    def rewards(self, answers: Answers) -> Tensor:
        """Return beta (h - z)."""
        assert answers.drift is not None, "a task that couples rows is given what they share"
        return self.beta * (answers.ratios - answers.drift)

    def counts(self, desirable: Tensor) -> Tensor:
        """Return how many answers each row has."""
        counts: Tensor = super().counts(desirable) * len(desirable)
        return counts


def _margin(values: Tensor) -> Tensor:
    """Return chosen minus rejected, [rows]."""
    return values[0] - values[1]
