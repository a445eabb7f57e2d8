"""One sample by its number, without what a batch needs: for who asks for single samples, ten times faster."""

import os
from typing import Any

import numpy as np
import torch

from saev_torch.order.selection import Selection
from saev_torch.reading.columns import Column
from saev_torch.reading.converting import convert_batch
from saev_torch.reading.labels import Labels


class SingleReader:
    """Reads samples of the store of `labels` one at a time, each into memory of its own. Threads may share it."""

    def __init__(self, labels: Labels, token_ids: Column, selection: Selection) -> None:
        self._store, self._selection = labels.store, selection
        self._beside: dict[str, Column] = {"token_label": labels} if self._store.has_labels else {}
        self._beside |= {"token_ids": token_ids} if self._store.has_token_ids else {}
        md, act_type = selection.md, selection.act_type
        self._shape = (selection.n_parts, md.d_model) if selection.has_parts else (md.d_model,)
        self._dtype, self._storage = getattr(torch, act_type.name), act_type.storage
        self._is_same = act_type == md.value_type
        self._part_nbytes = selection.act_nbytes // selection.n_parts
        first = selection.layer_idxs[0]
        layers = selection.layer_idxs[: selection.n_parts]
        self._shifts = [(layer - first) * md.tokens_per_example * md.row_nbytes for layer in layers]

    def read(self, sample: int) -> dict[str, Any] | None:
        """Read a sample, by a number that there is.

        Returns:
            `act`, `[d_model]` or `[n_layers, d_model]`, and numbers under the keys of a sample. None where a read
            failed, or came short.

        Raises what `ShardStore.opened`, `Selection.cells` and `Labels` do.
        """
        selection, row_nbytes = self._selection, self._selection.md.row_nbytes
        cells = selection.cells(np.array([sample]))
        shards, rows = selection.disk_rows(cells)
        memory = np.empty(selection.act_nbytes, dtype=np.uint8)
        view = memoryview(memory.data)
        # What becomes wider is read to the back of its place.
        at, offset = self._part_nbytes - row_nbytes, int(rows[0]) * row_nbytes
        with self._store.opened(int(shards[0])) as fd:
            for shift in self._shifts:
                try:
                    n = os.preadv(fd, [view[at : at + row_nbytes]], offset + shift)
                except OSError:
                    return None
                if n != row_nbytes:
                    return None
                at += self._part_nbytes
        act = torch.from_numpy(memory.view(self._storage)).view(self._dtype).view(self._shape)
        if not self._is_same:
            convert_batch(act, selection.md.value_type, None)
        columns = {key: int(column[0]) for key, column in selection.columns(cells).items()}
        example, token = columns.pop("example_idx"), columns.pop("token_idx")
        beside = {key: column.of_one(example, token) for key, column in self._beside.items()}
        return {"act": act, "example_idx": example, "token_idx": token, **beside, **columns}
