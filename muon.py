"""Muon, an optimizer of matrices: the layers of stage 1's decoder are trained by it."""
import torch


class Muon(torch.optim.Muon):
    """Momentum whose update of each matrix is made orthogonal, in fp32.

    torch.optim.Muon computes in bf16, which takes 20 to 40 times as long on CPUs that have only
    AVX2. Of its arguments, lr, weight_decay and momentum act; the others are constants here. The
    update is scaled to the size of AdamW's, so that both optimizers take one learning rate.
    found_inf: a scalar that runtime.optimizer_step() sets; if it is 1, a step changes nothing.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale: arXiv 2502.16982.
    """
    found_inf = torch.tensor(0.0)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                self.update_weight(weight, group["lr"], group["momentum"], group["weight_decay"])

    def update_weight(self, weight, lr, momentum, weight_decay):
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        running_mean = state["momentum_buffer"].lerp(weight.grad, 1 - momentum)         # m n
        update = weight.grad.lerp(running_mean, momentum)               # m n, Nesterov momentum
        update = orthogonalise(update)                                  # m n
        # An orthogonal m n matrix has a root mean square of 1 / sqrt(max(m, n)), AdamW's updates of
        # about 0.2.
        scale = 0.2 * max(weight.shape) ** 0.5
        new_weight = weight * (1 - lr * weight_decay)                   # m n
        new_weight.sub_(update, alpha=scale * lr)
        is_left_out = self.found_inf > 0
        state["momentum_buffer"].copy_(
            torch.where(is_left_out, state["momentum_buffer"], running_mean))
        weight.copy_(torch.where(is_left_out, weight, new_weight))


def orthogonalise(x):
    """A matrix m n with the singular vectors of x, and all singular values about 1.

    By five Newton-Schulz iterations, whose coefficients are Jordan's: they bring singular values to
    0.7 to 1.3 soon, rather than to 1 slowly.
    """
    is_tall = x.shape[0] > x.shape[1]
    x = x / x.norm().clamp(min=1e-7)                        # all singular values at most 1
    if is_tall:
        x = x.mT                                            # the smaller product x x^T
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
    return x.mT if is_tall else x
