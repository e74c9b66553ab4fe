"""`python -m bardlet` is `bardlet`."""

import sys

from bardlet.cli import main

sys.exit(main())
