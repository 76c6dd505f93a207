"""The methods: what a label loss, batches and bias heads are made of, as presets of one trainer.

Importing this does not import torch: the command's help lists the methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lnl_ext.adversary.bias_adversary import BiasAdversary

Coefficient = Any
"""A number, a 0-dim tensor or a schedule: what `lnl_ext.BiasAdversary` takes."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Which parts of the mechanism a method uses.

    Attributes
    ----------
    name : str
    description : str
        One line, with the source.
    reversal, entropy_weight, confusion_weight : bool
        Whether the method has the term; where not, its coefficient is 0.
    grey : bool
        Whether the network sees grey images.
    adjusted : bool
        Whether the label loss is adjusted by what the bias says about the label, and nothing else
        is done (`lnl_ext.logit_adjustment`).
    balanced : bool
        Whether batches are balanced over the groups of label and bias
        (`TrainerConfig.balance`). Methods with bias heads leave it to their recipe.
    reweighted : bool
        Whether the label loss is weighted by the inverse size of the sample's group
        (`lnl_ext.training.balance.balanced_weights`).
    group_dro : bool
        Whether the label loss is that of `lnl_ext.training.group_dro.GroupDRO`.
    """

    name: str
    description: str
    reversal: bool = False
    entropy_weight: bool = False
    confusion_weight: bool = False
    grey: bool = False
    adjusted: bool = False
    balanced: bool = False
    reweighted: bool = False
    group_dro: bool = False

    @property
    def knows_bias(self) -> bool:
        """Whether the method needs bias labels."""
        return self.adversarial or self.adjusted or self.balanced or self.reweighted

    @property
    def adversarial(self) -> bool:
        """Whether the method has bias heads at all."""
        return self.reversal or self.entropy_weight or self.confusion_weight

    def adversary(
        self,
        head: nn.Module,
        *,
        reversal: Coefficient = 0.1,
        entropy_weight: Coefficient = 0.01,
        confusion_weight: Coefficient = 1.0,
        **options: Any,
    ) -> BiasAdversary:
        """Return a `BiasAdversary` for ``head`` with the coefficients this method uses.

        Parameters
        ----------
        head
            Features to bias logits.
        reversal
            Used where the method has the term, else replaced by 0. The default is that of the
            authors' code.
        entropy_weight
            Likewise.
        confusion_weight
            Likewise, without a value of the authors'.
        **options
            Passed on to `BiasAdversary`.

        Raises
        ------
        ValueError
            If the method has no adversary.
        """
        from lnl_ext.adversary.bias_adversary import BiasAdversary

        if not self.adversarial:
            raise ValueError(f"method {self.name!r} trains without an adversary")
        return BiasAdversary(
            head,
            reversal=reversal if self.reversal else 0.0,
            entropy_weight=entropy_weight if self.entropy_weight else 0.0,
            confusion_weight=confusion_weight if self.confusion_weight else 0.0,
            **options,
        )

    def image_transform(
        self, mean: tuple[float, ...] = (0.0,), std: tuple[float, ...] = (1.0,)
    ) -> Callable[[Tensor], Tensor] | None:
        """Return the transform of normalised images that this method needs, or None."""
        from lnl_ext.training.image_transform import Grey

        return Grey(mean, std) if self.grey else None


METHODS = {
    method.name: method
    for method in (
        Method("baseline", "task loss only"),
        Method("gray", "task loss on grey images", grey=True),
        Method("blindeye", "confusion loss (Alvi et al. 2018)", confusion_weight=True),
        Method("grl", "gradient reversal (Ganin and Lempitsky 2015)", reversal=True),
        Method("entropy", "entropy of the bias prediction", entropy_weight=True),
        Method("lnl", "both (Kim et al. 2019, eq. 9)", reversal=True, entropy_weight=True),
        Method("adjusted", "logit adjustment by bias (Hong and Yang 2021)", adjusted=True),
        Method("resample", "batches balanced over label and bias", balanced=True),
        Method("reweight", "label loss weighted by inverse group size", reweighted=True),
        Method(
            "groupdro",
            "loss of the worst group, balanced batches (Sagawa et al. 2020)",
            balanced=True,
            group_dro=True,
        ),
    )
}
"""The methods by name."""


def get_method(name: str) -> Method:
    """Return the method called ``name``.

    Raises
    ------
    ValueError
        If there is none.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}") from None
