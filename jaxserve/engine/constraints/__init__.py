"""Constrains the tokens that requests may sample: masks, matchers of grammars, and how they are combined."""

from jaxserve.engine.constraints.combined import CombinedConstraints, StepMasks
from jaxserve.engine.constraints.masks import Constraints, masks_of, pack_mask

__all__ = ["CombinedConstraints", "Constraints", "StepMasks", "masks_of", "pack_mask"]
