"""What runs the stages and knows nothing of robots: errors, files, configs, run folders, processes."""

from runtime.config import (
    BACKBONES,
    HERE,
    STAGES,
    Count,
    PlaceConfig,
    Positive,
    laid_over,
    load_config,
    typed,
)
from runtime.errors import UserError, did_you_mean, one_line, one_of, refuse, regex

__all__ = ["BACKBONES", "HERE", "STAGES", "Count", "PlaceConfig", "Positive", "UserError", "did_you_mean"]
__all__ += ["laid_over", "load_config", "one_line", "one_of", "refuse", "regex", "typed"]
