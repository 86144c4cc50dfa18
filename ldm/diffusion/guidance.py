"""Classifier-free guidance (Ho & Salimans 2022): a predict with context becomes a predict without."""

from collections.abc import Callable, Sequence

from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]  # x [B, C, h, w], t [B] -> eps [B, C, h, w]
Numbers = Sequence[int]  # the prompt of each item, by the number that `predict` knows it by
ConditionalPredict = Callable[[Tensor, Tensor, Numbers], Tensor]  # x, t, B or 2 B numbers -> as many eps


def classifier_free_guidance(
    predict: ConditionalPredict,
    prompts: Numbers,
    unconditional: Numbers,
    guidance_scale: float,
    *,
    batched: bool = True,
    base: ConditionalPredict | None = None,
) -> Predict:
    """eps_uncond + guidance_scale * (eps_cond - eps_uncond), in the parametrisation of Stable Diffusion.

    prompts, unconditional: of B items each. Scale 1 is the conditional prediction alone. `batched` asks for
    x with [unconditional, prompts] at once, 2 B predictions of B latents; otherwise two passes, half the
    memory. Given a `base`, eps_uncond is its prediction, for the numbers that it knows the unconditional
    prompts by: a fine-tuned model's own may have moved with what it learned (Phunyaphibarn et al. 2025).
    """
    if guidance_scale == 1:
        return lambda x, t: predict(x, t, prompts)
    both = [*unconditional, *prompts]

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if base is not None:
            eps_uncond, eps_cond = base(x, t, unconditional), predict(x, t, prompts)
        elif batched:
            eps_uncond, eps_cond = predict(x, t, both).chunk(2)
        else:
            eps_uncond, eps_cond = predict(x, t, unconditional), predict(x, t, prompts)
        return eps_uncond + guidance_scale * (eps_cond - eps_uncond)

    return guided
