"""What runs the stages and knows nothing of robots: errors, files, configs, run folders, processes."""

import os
import sys

if sys.platform != "linux":  # before anything that only Linux has is imported
    sys.stderr.write(
        f"error: the kit runs on Linux, not on {sys.platform}: use WSL2 on Windows, or a Linux container"
        " with libegl1 and libgl1\n"
    )
    sys.exit(2)

os.environ["MPLBACKEND"] = "agg"  # plots become files: a notebook sets a backend that only it has

from runtime.config import (
    BACKBONES,
    HERE,
    STAGES,
    Count,
    Place,
    PlaceConfig,
    as_number,
    laid_over,
    load_config,
    shared_keys,
    typed,
)
from runtime.errors import UserError, did_you_mean, one_line, one_of, refuse, warn
