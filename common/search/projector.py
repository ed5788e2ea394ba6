"""An index in TensorBoard's projector: its vectors turn in space, coloured and searched by their
metadata.
"""

from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from common.errors import UserError
from common.search.index import ID, TEXT, Snapshot
from common.search.screen import short


def write(snapshot: Snapshot, rows: np.ndarray, folder: str, *, most: int) -> int:
    """Write at most `most` of the rows, evenly spread, for `tensorboard --logdir`; return how
    many. Raises UserError when the folder holds files.
    """
    if Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise UserError(f"--output-dir {folder}: it holds other files; name a new folder or remove it first")
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64))]
    columns = [ID, TEXT, *snapshot.metadata_columns()]
    # a tab or a line end would part a cell
    metadata = [[short(str(row[name])) or "-" for name in columns] for row in snapshot.take(chosen, columns)]
    with SummaryWriter(folder) as writer:
        writer.add_embedding(
            torch.from_numpy(snapshot.vectors_of(chosen)),
            metadata=metadata,
            metadata_header=columns,
            tag="texts",
        )
    return len(chosen)
