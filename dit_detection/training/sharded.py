"""Training whose weights are spread over processes (FSDP2, DeepSpeed ZeRO-3), and what it leaves is whole."""

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import Trainer


class ShardedTrainer(Trainer):
    """
    A `Trainer` for models that FSDP2 or DeepSpeed shards, as one of `scripts/accelerate_configs/` says.

    Invariant: wherever a model is saved, in `output_dir` and in every checkpoint, `from_pretrained` loads it. A
    checkpoint has the shards beside it, of weights and optimizer, from which any number of processes goes on.

    Raises:
        ValueError: FSDP is wanted where accelerate does not shard; `ema_decay` with sharded weights; or ZeRO-3
            could not save whole ones.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.transformer_cls_names_to_wrap is None:
                plugin.transformer_cls_names_to_wrap = blocks_of(self.model)

    def create_accelerator_and_postprocess(self) -> None:
        """As `Trainer`; refuses what would end in another training than was asked for."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not self.is_fsdp_enabled:
            # accelerate (1.15) then takes DDP, without a word.
            raise ValueError(
                f"FSDP is asked for, but accelerate shards nothing on {state.device.type}: launch without an FSDP "
                "config (--multi_gpu --use_cpu for several CPU processes)."
            )
        # Not in the callback: what a config of accelerate's asks for does not show in the arguments that it gets.
        if getattr(self.args, "ema_decay", None) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("ema_decay needs whole weights on every process: leave out FSDP or DeepSpeed.")
        if self.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 2:
            # accelerate's would round all that goes in and out of the model to bf16, whose 8 bits are steps of 4
            # pixels in an image of 1,000. Here autocast decides what is computed in bf16, as without sharding.
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        if self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
            zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            if zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
                raise ValueError(
                    "With ZeRO-3 set zero3_save_16bit_model: true (stage3_gather_16bit_weights_on_model_save in a "
                    "DeepSpeed file): without it no weights are saved that from_pretrained could load."
                )

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """As `Trainer`; with FSDP2 autocast, which accelerate puts around all models but these."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if not isinstance(self.model, FSDPModule) or dtype is None:
            return super().autocast_smart_context_manager(cache_enabled)
        # What is cached would be the whole model's weights in this type, in each process.
        return torch.autocast(self.accelerator.device.type, dtype=dtype, cache_enabled=False)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, called in all processes; the weights are always gathered into whole ones."""
        if self.is_fsdp_enabled and "SHARDED_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            # `Trainer` would save nothing.
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            self._save(output_dir, state_dict=get_model_state_dict(self.model, options=options))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model: Any = self.model
        sharded_class = type(model)
        # The code of a model's class travels with it: not that of the class which torch derives from it.
        if isinstance(model, FSDPModule):
            model.__class__ = next(base for base in sharded_class.__bases__ if base is not FSDPModule)
        try:
            super()._save(output_dir, state_dict)
        finally:
            model.__class__ = sharded_class


def blocks_of(model: nn.Module) -> list[str]:
    """
    Names of the classes whose modules are sharded one by one: those of `_no_split_modules` that the model has.

    accelerate (1.15) fails on others, such as the latent encoder's where a DiT is on pixels.
    """
    present = {type(module).__name__ for module in model.modules()}
    return sorted(present & set(getattr(model, "_no_split_modules", None) or ()))
