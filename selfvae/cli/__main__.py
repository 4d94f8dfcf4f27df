"""python -m selfvae.cli"""

import sys

from selfvae.cli import main

sys.exit(main())
