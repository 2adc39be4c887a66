"""The terms of SLMRec's objective (arXiv:2405.17890, section 3.3), each a function of one block's features."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def direction_loss(
    student: Float[Tensor, "targets hidden"], teacher: Float[Tensor, "targets hidden"]
) -> Float[Tensor, ""]:
    """Mean of 1 - cos(student, teacher), in [0, 2]; zero iff the directions agree.

    A mean over targets, so its scale does not depend on the batch. Gradients reach the student only. SLMRec eq. 3.
    """
    return 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1).mean()


def magnitude_loss(
    student: Float[Tensor, "targets hidden"], teacher: Float[Tensor, "targets hidden"], *, scale: str
) -> Float[Tensor, ""]:
    """Mean squared distance; zero iff the features are equal. Gradients reach the student only. SLMRec eq. 4.

    With scale "hidden" it is divided by the teacher's mean squared norm over the batch, so that its size does not
    depend on the decoder; with "none" it is the paper's, which swamps the cross-entropy on real decoders.
    """
    reference = teacher.detach().float()
    distance = (student.float() - reference).pow(2).sum(dim=-1).mean()
    return distance / reference.pow(2).sum(dim=-1).mean() if scale == "hidden" else distance
