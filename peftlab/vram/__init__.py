"""Will it fit? Memory of fine-tuning, predicted without a GPU (`predict`) and measured with one (`measure`)."""

from .memory import Memory
from .prediction import predict

__all__ = ["Memory", "predict"]
