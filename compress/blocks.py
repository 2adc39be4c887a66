"""How the layers of teacher and student are paired: blocks, and which layers a student starts from."""


def block_ends(num_layers: int, num_blocks: int) -> list[int]:
    """Index of the last layer of each block: block i of B ends at layer ceil(i * N / B).

    >>> block_ends(num_layers=8, num_blocks=4), block_ends(num_layers=30, num_blocks=4)
    ([1, 3, 5, 7], [7, 14, 22, 29])
    """
    return [-(-block * num_layers // num_blocks) - 1 for block in range(1, num_blocks + 1)]


def state_index(layer: int) -> int:
    """Where the state after a layer stands among a decoder's states: entry 0 is what the first layer reads.

    >>> [state_index(layer) for layer in block_ends(num_layers=4, num_blocks=2)]
    [2, 4]
    """
    return layer + 1


def kept_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """Teacher layers a student starts from, evenly spaced, the last of each stretch.

    >>> kept_layers(teacher_layers=8, student_layers=4), kept_layers(teacher_layers=8, student_layers=3)
    ([1, 3, 5, 7], [2, 5, 7])
    """
    return block_ends(teacher_layers, student_layers)
