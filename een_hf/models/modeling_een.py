"""The classes that adapters inherit from: `EarlyExitMixin` for encoders of texts and for encoders of images."""

import torch
from transformers.utils.output_capturing import capture_outputs

from .exit_mixin import EarlyExitMixin
from .exits import BertExitHead, ViTExitHead
from .policies import ExitPolicy
from .registries import ExitConfigurationError
from .staged_forward import EarlyExitClassifierOutput
from .stages import Examples


class LayerOutput(torch.nn.Module):
    """Makes the results of layers visible to the hooks that record hidden states and attentions.

    `run_layer` calls it if the output of the stock layers cannot be recorded. The adapter declares it:
    `_can_record_outputs = {"hidden_states": LayerOutput, "attentions": LayerOutput}`.
    """

    def forward(self, before: torch.Tensor, after: torch.Tensor, attention: torch.Tensor | None = None) -> tuple:
        return after, attention


class EarlyExitTextMixin(EarlyExitMixin):
    """`EarlyExitMixin` for an encoder of texts whose `base_model.embeddings` takes the inputs that `forward` names."""

    head_class = BertExitHead

    def embed(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None
    ) -> Examples:
        self.check_one_input(input_ids, inputs_embeds)
        hidden = self.base_model.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        return Examples(hidden, attention_mask)

    @staticmethod
    def check_one_input(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
        """Check that there are either tokens or their embeddings.

        Args:
            input_ids: (batch, length), or `None`.
            inputs_embeds: (batch, length, hidden_size), or `None`.

        Raises:
            ExitConfigurationError: both are given, or none.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ExitConfigurationError("Give exactly one of input_ids and inputs_embeds.")

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        early_exit: bool | ExitPolicy | dict = True,
        **kwargs,
    ) -> EarlyExitClassifierOutput:
        """Classify texts.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds: (batch, length, ...), as in the
                stock class.
            labels: as in `loss_matrix`; `None`: no loss.
            early_exit: as in `EarlyExitMixin.run_exits`.
            **kwargs: passed to every layer.

        Returns:
            the output: dynamic if a policy is used, else anytime.
        """
        examples = self.embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.run_exits(examples, labels, early_exit, **kwargs)


class EarlyExitUntypedTextMixin(EarlyExitTextMixin):
    """`EarlyExitTextMixin` for an encoder without token types."""

    def embed(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None) -> Examples:
        self.check_one_input(input_ids, inputs_embeds)
        hidden = self.base_model.embeddings(
            input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        return Examples(hidden, attention_mask)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        early_exit: bool | ExitPolicy | dict = True,
        **kwargs,
    ) -> EarlyExitClassifierOutput:
        """Classify texts.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: (batch, length, ...), as in the stock class.
            labels: as in `loss_matrix`; `None`: no loss.
            early_exit: as in `EarlyExitMixin.run_exits`.
            **kwargs: passed to every layer.

        Returns:
            the output: dynamic if a policy is used, else anytime.
        """
        examples = self.embed(input_ids, attention_mask, position_ids, inputs_embeds)
        return self.run_exits(examples, labels, early_exit, **kwargs)


class EarlyExitImageMixin(EarlyExitMixin):
    """`EarlyExitMixin` for a vision transformer: class token, patches, and learned positions under the stock names."""

    head_class = ViTExitHead

    def embed(self, pixel_values=None, interpolate_pos_encoding=None) -> Examples:
        return Examples(
            self.base_model.embeddings(
                self.check_images(pixel_values), interpolate_pos_encoding=interpolate_pos_encoding
            )
        )

    def check_images(self, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Check that there are images, and convert them to the precision of the patch projection.

        Args:
            pixel_values: (batch, channels, height, width).

        Returns:
            the images, of the same shape.

        Raises:
            ExitConfigurationError: there are none.
        """
        if pixel_values is None:
            raise ExitConfigurationError("Give pixel_values.")
        return pixel_values.to(self.base_model.embeddings.patch_embeddings.projection.weight.dtype)

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        """Change the size of the images that the model takes; the position embeddings are interpolated.

        Args:
            image_size: height and width in pixels, a multiple of the patch size.
        """
        embeddings = self.base_model.embeddings
        patches, table = embeddings.patch_embeddings, embeddings.position_embeddings
        count = (image_size // patches.patch_size[0]) * (image_size // patches.patch_size[1])
        if table is not None:
            shaped = table.new_empty(1, table.shape[1] - patches.num_patches + count, table.shape[2])
            resized = embeddings.interpolate_pos_encoding(shaped, image_size, image_size)
            embeddings.position_embeddings = torch.nn.Parameter(resized.clone())
        embeddings.image_size = patches.image_size = (image_size, image_size)
        patches.num_patches = count
        self.config.image_size = image_size

    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        early_exit: bool | ExitPolicy | dict = True,
        **kwargs,
    ) -> EarlyExitClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (batch, channels, height, width).
            labels: as in `loss_matrix`; `None`: no loss.
            interpolate_pos_encoding: as in the stock class.
            early_exit: as in `EarlyExitMixin.run_exits`.
            **kwargs: passed to every layer.

        Returns:
            the output: dynamic if a policy is used, else anytime.
        """
        return self.run_exits(self.embed(pixel_values, interpolate_pos_encoding), labels, early_exit, **kwargs)
