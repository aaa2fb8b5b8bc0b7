"""``python -m milan_ray.cli VERB …``."""

import sys

from milan_ray.cli import main

sys.exit(main())
