import sys
from pathlib import Path

# As pytest has it: helpers in tests/ import each other by their bare names.
sys.path.append(str(Path(__file__).parents[1]))

from .run import main

main()
