"""
A detector → a page in the browser on which it can be tried; or the folder of a Hugging Face Space that shows it.

    python scripts/demo.py my-detector
    python scripts/demo.py my-detector --space my-space
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name
    from dit_detection.cli import run

    run("demo", sys.argv[1:])
