"""Out of Python: ONNX, torch.export and AOTInductor, each checked before it is kept."""

from mergence.exporting.checked import Export as Export
from mergence.exporting.checked import export as export

__all__ = ["Export", "export"]
