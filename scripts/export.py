"""
A detector → a file that runs without this package: ONNX or a `torch.export` program.

    python scripts/export.py my-detector detector.onnx --post_processing
    python scripts/export.py my-detector detector.pt2 --static_size 512 512
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name
    from dit_detection.cli import run

    run("export", sys.argv[1:])
