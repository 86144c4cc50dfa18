"""Classifier-free guidance (Ho & Salimans 2022)."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ldm.diffusion.process import Level

Denoise = Callable[[Tensor, Level], Tensor]  # x [B, C, h, w] at a level -> its denoised x0 [B, C, h, w]
PromptIndex = Sequence[int]  # the prompt of each item, by the number that `denoise` knows it by
ConditionalDenoise = Callable[
    [Tensor, Level, PromptIndex], Tensor
]  # x, level, B or 2 B numbers -> as many x0


def classifier_free_guidance(
    denoise: ConditionalDenoise,
    prompts: PromptIndex,
    unconditional: PromptIndex,
    guidance_scale: float,
    *,
    batched: bool = True,
    base: ConditionalDenoise | None = None,
) -> Denoise:
    """uncond + guidance_scale * (cond - uncond), in the parametrisation of Stable Diffusion.

    It acts on denoised latents; at one x and level they are affine in eps and in v, so guidance of these is
    the same. prompts, unconditional: of B items each. Scale 1 is the conditional prediction alone. `batched`
    asks for x with [unconditional, prompts] at once, 2 B predictions of B latents; otherwise two passes, half
    the memory. Given a `base`, uncond is its prediction, for the numbers that it knows the unconditional
    prompts by: a fine-tuned model's own may have moved with what it learned (Phunyaphibarn et al. 2025).
    """
    if guidance_scale == 1:
        return lambda x, level: denoise(x, level, prompts)
    both = [*unconditional, *prompts]

    def guided(x: Tensor, level: Level) -> Tensor:
        if base is not None:
            uncond, cond = base(x, level, unconditional), denoise(x, level, prompts)
        elif batched:
            uncond, cond = denoise(x, level, both).chunk(2)
        else:
            uncond, cond = denoise(x, level, unconditional), denoise(x, level, prompts)
        return uncond + guidance_scale * (cond - uncond)

    return guided
