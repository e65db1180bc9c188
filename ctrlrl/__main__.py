"""``python -m ctrlrl`` is the command line."""

import sys

from ctrlrl.run.cli import main

sys.exit(main())
