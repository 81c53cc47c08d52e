"""The built-in models.

None sets a dropout rate, which is the lane's own. In front of batch norm a layer has no bias: the
norm would cancel it, and Adam would walk it along the rounding errors of a gradient that is zero.
"""

from worker.tasks.models.convolutional import cnn
from worker.tasks.models.perceptron import linear, mlp
from worker.tasks.models.tabular import tabular_resnet
from worker.tasks.models.transformer import vit_tiny

__all__ = ["cnn", "linear", "mlp", "tabular_resnet", "vit_tiny"]
