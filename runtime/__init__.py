"""What runs the stages and knows nothing of robots: errors, files, configs, run folders, processes."""

import sys

if sys.platform != "linux":  # before anything that only Linux has is imported
    line = "use WSL2 on Windows, or a Linux container with libegl1 and libgl1"
    sys.stderr.write(f"error: the kit runs on Linux, not on {sys.platform}: {line}\n")
    sys.exit(2)

from runtime.config import (
    BACKBONES,
    HERE,
    STAGES,
    Count,
    Place,
    PlaceConfig,
    Positive,
    laid_over,
    load_config,
    typed,
)
from runtime.errors import UserError, did_you_mean, one_line, one_of, refuse, regex

__all__ = ["BACKBONES", "HERE", "STAGES", "Count", "Place", "PlaceConfig", "Positive", "UserError"]
__all__ += ["did_you_mean", "laid_over", "load_config", "one_line", "one_of", "refuse", "regex", "typed"]
