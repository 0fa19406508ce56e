"""Make the sample that ``python -m fastloss score`` scores: held-out predictions of a logistic regression.

The data is scikit-learn's copy of the handwritten digits of the UCI machine learning repository: 1,797 images of 8 x 8
pixels. Three quarters train a multinomial logistic regression; its logits for the other 450 images are the sample. The
split is seeded, the solver has no random part, and the file holds no time stamp: a second run writes the same bytes.
Another BLAS may move the last digits of the logits. The file in the repository was made with scikit-learn 1.9.1.

    python benchmarks/make_sample.py
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

SAMPLE = Path(__file__).resolve().parents[1] / "fastloss" / "sample" / "digits.npz"


def held_out_predictions() -> tuple[np.ndarray, np.ndarray]:
    """The logits (450, 10) and the digits (450) of the held-out images."""
    images, digits = load_digits(return_X_y=True)
    train_images, test_images, train_digits, test_digits = train_test_split(
        images / 16.0, digits, test_size=450, random_state=0, stratify=digits
    )
    # A tight tolerance, so that the solution does not depend on where the solver stops.
    model = LogisticRegression(tol=1e-8, max_iter=10_000).fit(train_images, train_digits)
    return model.decision_function(test_images).astype(np.float32), test_digits.astype(np.int64)


def main() -> None:
    logits, targets = held_out_predictions()
    SAMPLE.parent.mkdir(exist_ok=True)
    np.savez(SAMPLE, logits=logits, targets=targets)
    print(f"{SAMPLE}: {SAMPLE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
