r"""Which sample stands where in which batch, and what is read when: pure integers, no torch, no files.

The words below have one meaning in the whole package. With two lanes, a and b, and chunks that are dealt to two turns:

    disk      0 1 2 3 | 4 5 6 7 | 8 9 ...   blocks of two samples; of each two blocks, lane a takes one and lane b one
    lane a    8 9     0 1     6 7   ...     its blocks, in random order
    chunk     0       1       2     ...     what lane a reads at once: here one block, in truth many
              | \     | \     | \
    turn      0  1    1  2    2  3          the samples of a chunk are dealt to the next turns of its lane
    batch     0  2    2  4    4  6          the turns of lane a are batches 0, 2, 4, ..., those of lane b 1, 3, 5, ...

On disk:
    example  One input of the model, as an image or a text.
    token    A part of an example that the model has activations for: content, or special ([CLS]).
    layer    A layer of the model whose activations were recorded.
    cell     A place on the grid of examples, layers and tokens, selected or not.
    sample   A selected cell. Samples are numbered in the order of the bytes on disk.

In the order:
    batch    The samples that the user gets at once; each is a row of it.
    block    Consecutive samples that one lane takes. A super-block has one block for each lane.
    lane     An independent part of the shuffle, with blocks and batches of its own.
    chunk    What a lane reads at once, and deals at random to its next turns.
    turn     The position of a batch in its lane.

In a reading process:
    share    The batches that one reader, a worker of a rank, owns.
    load     A chunk to read, and which of its samples go to batches of the share.
    step     The loads that are read together, and the batches that are whole after it.

In memory, where `reading` and `processes` say more:
    extent   A range of a file, and where its bytes go.
    slot     The memory of one batch.
    page     Memory that processes share.
"""
