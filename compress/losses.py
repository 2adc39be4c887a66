"""The terms of SLMRec's objective (arXiv:2405.17890, section 3.3), functions of features or of scores."""

from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F

Features = Float[Tensor, "targets hidden"]
Scores = Float[Tensor, "targets items"]


def direction_loss(student: Features, teacher: Features) -> Float[Tensor, ""]:
    """Mean of 1 - cos(student, teacher), in [0, 2]; zero iff the directions agree.

    A mean over targets, so its scale does not depend on the batch. Detach the teacher to keep it frozen. SLMRec eq. 3.
    """
    student, teacher = student.float(), teacher.float()
    lengths = vector_norm(student, dim=-1) * vector_norm(teacher, dim=-1)  # dividing the vectors takes twice as long
    cosines: Tensor = (student * teacher).sum(dim=-1) / lengths.clamp_min(1e-8)
    return 1 - cosines.mean()


def magnitude_loss(
    student: Features, teacher: Features, *, norm: Tensor | None = None, squared: bool = True
) -> Float[Tensor, ""]:
    """Mean distance, squared (SLMRec eq. 4) or not (the published code); zero iff the features are equal.

    Divided by `norm`, a mean squared norm of the teacher's features (by its root where distances are not squared), its
    size does not depend on the decoder; without, it is the paper's, which swamps the cross-entropy on real decoders.
    Detach the teacher to keep it frozen.
    """
    gaps = (student.float() - teacher.float()).pow(2).sum(dim=-1)
    if not squared:
        gaps = (gaps + gaps.eq(0)).sqrt() * gaps.ne(0)  # the root's slope at 0 is infinite
    if norm is None:
        return gaps.mean()
    return gaps.mean() / (norm if squared else norm.sqrt())


def divergence_loss(student: Scores, teacher: Scores) -> Float[Tensor, ""]:
    """Mean KL(teacher || student) of the two softmaxes at temperature 1; zero iff scores agree up to a constant.

    Over all items it is online distillation's logit loss, over a teacher's best items the list loss. Gradients reach
    the student only.
    """
    wanted = teacher.detach().float().log_softmax(dim=-1)
    return F.kl_div(student.float().log_softmax(dim=-1), wanted, reduction="batchmean", log_target=True)
