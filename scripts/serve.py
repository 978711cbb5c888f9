"""
A detector behind HTTP: images in, boxes out.

    python scripts/serve.py my-detector
    python scripts/serve.py my-detector --host 0.0.0.0 --port 80 --workers 4
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name
    from dit_detection.cli import run

    run("serve", sys.argv[1:])
