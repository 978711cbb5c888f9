"""
A detector on images → boxes as JSON, and pictures.

    python scripts/predict.py my-detector photo.jpg
    python scripts/predict.py my-detector folder/of/images --output_dir out --threshold 0.5
"""

from dit_detection.commands.predict import main

if __name__ == "__main__":
    main()
