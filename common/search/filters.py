"""`--where`: which rows of an index an SQL condition holds for.

DuckDB reads the condition over the rows' own columns. It gets no access to files, network or
extensions, and the condition is parsed as one expression, so that it can ask of a row and do
nothing else.
"""

import duckdb
import numpy as np
import pyarrow as pa

from common.errors import UserError, one_line
from common.search.index import HASH, OWN_COLUMNS, Snapshot

SAFE = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
}


def matching(snapshot: Snapshot, condition: str | None) -> np.ndarray:
    """Return a mask (rows) of the live rows for which a condition such as "label = 'tech' AND year
    > 2004" is true; None: of all live rows.

    Raises UserError when it is no condition over the columns of the index.
    """
    mask = snapshot.alive()
    if condition is None:
        return mask
    columns = ["_id", "_text", *snapshot.metadata_columns()]
    twins = [
        name
        for name in columns
        if sum(name.lower() == other.lower() for other in columns) > 1 and name.lower() in condition.lower()
    ]
    if twins:
        raise UserError(
            f"--where {condition!r}: columns {', '.join(twins)} differ only in their case, which SQL doesn't"
            " tell apart; rename one and index the texts anew, or write a condition without them"
        )
    number = free_name("_row", [*columns, *OWN_COLUMNS])
    try:
        with duckdb.connect(config=SAFE) as connection:
            connection.execute("SET lock_configuration = true")
            for start, segment in zip(snapshot.starts, snapshot.segments):
                table = segment.table.drop_columns([HASH]).append_column(
                    number, pa.array(np.arange(len(segment.alive)))
                )
                found = connection.from_arrow(table).filter(condition).project(number).fetchnumpy()[number]
                here = np.zeros(len(segment.alive), bool)
                here[np.asarray(found, np.int64)] = True
                mask[start : start + len(here)] &= here
    except duckdb.Error as error:
        raise UserError(
            f"--where {condition!r}: {one_line(error)}; write a condition over {', '.join(columns)}, with"
            " texts in single quotes"
        ) from error
    return mask


def free_name(wanted: str, taken: list[str]) -> str:
    """Return a name that none of the `taken` equals, as SQL compares them: without regard
    to case.
    """
    return wanted if wanted.lower() not in map(str.lower, taken) else free_name(wanted + "_", taken)
