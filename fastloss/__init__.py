"""Classification losses on the CPU: PyTorch's losses for NumPy arrays, faster and with more digits."""

from fastloss import metrics as metrics
from fastloss import streaming as streaming
from fastloss.files import score_file
from fastloss.functional import cross_entropy, kl_div, log_softmax, logsumexp, nll_loss, softmax
from fastloss.gradients import value_and_grad
from fastloss.modules import CrossEntropyLoss, KLDivLoss, LogSoftmax, NLLLoss, Softmax

__all__ = [
    "CrossEntropyLoss",
    "KLDivLoss",
    "LogSoftmax",
    "NLLLoss",
    "Softmax",
    "cross_entropy",
    "kl_div",
    "log_softmax",
    "logsumexp",
    "nll_loss",
    "score_file",
    "softmax",
    "value_and_grad",
]

__version__ = "0.1.0"
