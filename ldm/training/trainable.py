"""What learns: whole networks, LoRA factors beside them, a learned token; their rates, and their files."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from ldm.annotations import Builds, Node, NonNegativeFloat, NonNegativeInt
from ldm.checkpoints.adapter import merge_adapter, save_adapter
from ldm.checkpoints.embedding import embeddings_beside, save_embedding
from ldm.checkpoints.layout import LEARNED_TOKENS
from ldm.checkpoints.lora import lora_beside, merge_lora, save_lora
from ldm.checkpoints.lora_ranks import ranks_metadata
from ldm.config import instantiate
from ldm.errors import UserError
from ldm.models.adapter import ALGORITHMS, Adapter
from ldm.models.lora import LoRA
from ldm.optim.optimizers import ParamGroups
from ldm.training.techniques import LearnedToken
from ldm.training.text_rates import each_encoder, freeze_unrated, rates_of_encoders

log = logging.getLogger(__name__)

BY_TIMESTEP = "The LoRA has fewer ranks at noisier timesteps, which scripts/sample.py --lora heeds"
StateDicts = Mapping[str, Mapping[str, Tensor]]


class Trainable:
    """Which parameters of the networks learn, at which rates, and how they are exported.

    Args:
        unet, text_encoder: whether the network learns.
        text_encoder_steps: optimizer steps after which the text encoder stays as it is; None: it learns on.
        lora: node of a `LoRA`: what learns are factors beside the layers of the networks.
        adapter: in a LoRA's place: a DoRA, LoHa, LoKr or OFT, by the package lycoris-lora.
        learned_token: node of a `LearnedToken`: textual inversion, with the networks or, where both are
            switched off, alone. Its vectors are kept in `embeddings/WORD.safetensors`.
        learning_rate: of the UNet, and of the text encoder where it has none of its own. A UNet of rate 0
            still has gradients, which `unet: false` spares.
        text_encoder_learning_rate: None is the same, 0 leaves its weights frozen; of SDXL's two also
            {clip_l: 5e-6, clip_g: 0}, where one of rate 0 is frozen.
    """

    def __init__(
        self,
        *,
        unet: bool = True,
        text_encoder: bool = True,
        text_encoder_steps: NonNegativeInt | None = None,
        lora: Annotated[Node, Builds(LoRA)] | None = None,
        adapter: Adapter | None = None,
        learned_token: Annotated[Node, Builds(LearnedToken)] | None = None,
        learning_rate: NonNegativeFloat = 1e-6,
        text_encoder_learning_rate: NonNegativeFloat | Mapping[str, NonNegativeFloat] | None = None,
    ):
        self.chosen = {"unet": unet, "text_encoder": text_encoder, "vae": False}
        self.text_encoder_steps = text_encoder_steps
        if lora and adapter:
            remedy = "Take one of them off."
            raise UserError("A LoRA and another adapter exclude each other", where="adapter", remedy=remedy)
        self.lora: LoRA | Adapter | None = instantiate(lora) if lora else adapter
        self.learned_token: LearnedToken | None = instantiate(learned_token) if learned_token else None
        own = text_encoder_learning_rate
        self.learning_rates: dict[str, float] = {"unet": learning_rate}
        self.text_encoder_rate = learning_rate if own is None else own
        if self.learned_token is not None:
            self.learning_rates["learned_token"] = self.learned_token.learning_rate

    def attach(self, networks: Mapping[str, nn.Module], *, timesteps: int) -> None:
        """Freezes what does not learn, and puts the LoRA beside its layers. To be called once.

        timesteps: of the noise schedule.
        """
        for name, network in networks.items():
            network.requires_grad_(self.chosen[name])
        rates = rates_of_encoders(networks["text_encoder"], self.text_encoder_rate)
        freeze_unrated(networks["text_encoder"], rates)
        self.learning_rates |= rates
        if self.lora is not None:
            adapted = {name: networks[name] for name in ("unet", "text_encoder")}
            self.lora.attach(adapted, timesteps=timesteps)

    def add_token(self, networks: Mapping[str, nn.Module]) -> None:
        """Lets prompts hold the new word, if there is one, and begins an adapter from the base's weights.

        To be called when these are there.
        """
        if isinstance(self.lora, Adapter):
            self.lora.begin()
        text_encoder, new = networks["text_encoder"], self.learned_token
        if new is not None:
            text_encoder.add_token(new.word, text_encoder.token_embedding_of(new.init))

    def modules(self, networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Name of a parameter group -> what the optimizer changes: a network, its LoRA, or the token."""
        modules = networks if self.lora is None else self.lora.layers
        text = networks["text_encoder"].weights if self.lora is None else modules["text_encoder"]
        tokens = {"learned_token": networks["text_encoder"].learned_tokens} if self.learned_token else {}
        return {"unet": modules["unet"], "text_encoder": text, **tokens}

    def param_groups(self, networks: Mapping[str, nn.Module]) -> ParamGroups:
        """Name of a parameter group -> what the optimizer changes, and its learning rate."""
        modules = self.modules(networks)
        if "text_encoder" not in self.learning_rates:
            modules |= each_encoder(modules.pop("text_encoder"))
        return {name: (module, self.learning_rates[name]) for name, module in modules.items()}

    def rates(self, networks: Mapping[str, nn.Module]) -> list[float]:
        """Learning rates of what learns; a new word's too, whose vectors come with the base's weights."""
        groups = self.param_groups(networks)
        groups.pop("learned_token", None)
        learning = [rate for part, rate in groups.values() if any(p.requires_grad for p in part.parameters())]
        return learning if self.learned_token is None else [*learning, self.learned_token.learning_rate]

    def text_learns(self, networks: Mapping[str, nn.Module]) -> bool:
        """Whether the contexts of prompts change in training."""
        modules = (module for name, module in self.modules(networks).items() if name != "unet")
        return any(p.requires_grad for module in modules for p in module.parameters())

    def text_learns_at(self, step: int) -> bool:
        """Whether the text encoder gets gradients at an optimizer step, if it learns at all."""
        return self.text_encoder_steps is None or step < self.text_encoder_steps

    def export(
        self,
        path: Path,
        networks: Mapping[str, nn.Module],
        *,
        dtype: torch.dtype,
        metadata: dict[str, str],
    ) -> StateDicts:
        """The state dicts of a model file at `path`, for whole networks; what else there is lies beside it.

        A LoRA or adapter is merged in them, and alone in `loras/RUN.safetensors`; a new word in
        `embeddings/WORD.safetensors`.
        """
        state_dicts = {name: network.state_dict() for name, network in networks.items()}
        text = state_dicts["text_encoder"]
        state_dicts["text_encoder"] = {k: x for k, x in text.items() if LEARNED_TOKENS not in k}
        for word, vectors in networks["text_encoder"].learned_tokens.items():
            save_embedding(embeddings_beside(path), word, vectors, metadata=metadata)
        if self.lora is None:
            return state_dicts
        beside, how = lora_beside(path), {"dtype": dtype, "metadata": metadata}
        if isinstance(self.lora, Adapter):
            adapted = self.lora.adapted()
            tensors = {at: layer.inner.state_dict() for at, layer in adapted.items()}
            algorithm = ALGORITHMS[self.lora.kind]
            save_adapter(beside, tensors, state_dicts, algorithm=algorithm, rank=self.lora.rank, **how)
            return merge_adapter(state_dicts, {at: layer.merged for at, layer in adapted.items()})
        layers = self.lora.weights()
        if self.lora.masks is not None:
            how["metadata"] = metadata | ranks_metadata(self.lora.masks.ranks)
            log.info("%s; %s has all ranks at all timesteps, as in other tools.", BY_TIMESTEP, path.name)
        save_lora(beside, layers, state_dicts, **how)
        return merge_lora(state_dicts, layers)
