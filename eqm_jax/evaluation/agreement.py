"""Label agreement: does a classifier of real images see the class that was asked for?"""

import numpy as np


class Classifier:
  """A support vector machine on pixels, fitted to three quarters of the real images."""

  name = "sklearn.svm.SVC(C=10)"

  def __init__(self, images: np.ndarray, labels: np.ndarray):
    """Fits `images` [N, ...] to `labels` [N]; the split is the same each time."""
    import sklearn.model_selection
    import sklearn.svm

    fit_x, held_x, fit_y, held_y = sklearn.model_selection.train_test_split(
      images.reshape(len(images), -1), labels, test_size=0.25, random_state=0, stratify=labels
    )
    self._svc = sklearn.svm.SVC(C=10).fit(fit_x, fit_y)
    self.held_out_accuracy = float(self._svc.score(held_x, held_y))  # on real images it was not fitted to

  def predict(self, images: np.ndarray) -> np.ndarray:
    """The class seen in each of `images` [N, ...], [N]."""
    return self._svc.predict(images.reshape(len(images), -1))

  def agreement(self, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of `images` [N, ...] that are classified as `labels` [N]."""
    return float(np.mean(self.predict(images) == labels))
