"""Publishing: the model card and the files that are pushed to the Hub during training."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import custom_object_save

from ..hub.header import CARD_NAME, is_run_card
from ..sharding import is_sharded, whole_shapes
from .adapters import hide_base_path, save_base_config


_PUBLISHING = ContextVar("whether arguments are pickled for others to read", default=False)


@contextmanager
def publishing() -> Iterator[None]:
    """Inside the block, for files that are pushed, arguments are pickled without tokens and local paths."""
    token = _PUBLISHING.set(True)
    try:
        yield
    finally:
        _PUBLISHING.reset(token)


def is_publishing() -> bool:
    """Whether files that are pushed are being written."""
    return _PUBLISHING.get()


class PublishingMixin:
    """The part of `EarlyExitTrainer` that writes the model card and pushes."""

    def create_model_card(self, language=None, license=None, tags=None, **kwargs) -> None:
        """As in `Trainer`, but the card of an evaluated run is kept, with these fields added to its header."""
        path = os.path.join(self.args.output_dir, CARD_NAME)
        if not is_run_card(path):
            super().create_model_card(language=language, license=license, tags=tags, **kwargs)
        elif self.is_world_process_zero():
            card = ModelCard.load(path)
            for name, value in (("language", language), ("license", license)):
                if value is not None:
                    card.data[name] = value
            tags = [tags] if isinstance(tags, str) else tags or []
            card.data.tags = list(dict.fromkeys([*card.data.tags, *tags]))
            card.save(path)

    def _save(self, output_dir=None, state_dict=None):
        model, network = self.model, self.network
        if is_sharded(network):
            self.model = whole_shapes(network)  # the class of shards is torch's, and its files would be saved
        try:
            with publishing():
                super()._save(output_dir, state_dict)
        finally:
            self.model = model
        if self.has_adapter and self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_base_config(self.network, folder)
            if self.args.push_to_hub:
                hide_base_path(self.accelerator.unwrap_model(self.model), folder)

    def _push_from_checkpoint(self, checkpoint_folder):
        # Trainer pushes config and weights of the checkpoint; the config refers to these files.
        if self.is_world_process_zero():
            network = whole_shapes(self.network) if is_sharded(self.network) else self.network
            save = save_base_config if self.has_adapter else custom_object_save
            save(network, self.args.output_dir)
        with publishing():
            super()._push_from_checkpoint(checkpoint_folder)
