"""The image encoder of a bundle: a part of Optimum's, whose compressed weights this package's kernel may multiply."""

from __future__ import annotations

import openvino
from optimum.intel.openvino.modeling_visual_language import OVVisionEmbedding

from optimum_llava_ov.kernels.extension import with_compressed_matmuls


class ImageEncoder(OVVisionEmbedding):
    """Run Optimum's image encoder.

    The loaded graph does not change, so that it can be saved. A copy that shares its weights is compiled.

    Args:
        uses_extension: Whether the kernel of this package multiplies compressed weights.
    """

    request: openvino.CompiledModel | None

    def __init__(self, model: openvino.Model, parent_model, uses_extension: bool):
        super().__init__(model, parent_model)
        self._uses_extension = uses_extension
        self.packs_weights = True

    def compile(self) -> None:
        if self.request is None and self._uses_extension:
            executed = with_compressed_matmuls(self.model)
            self.packs_weights = executed is self.model  # copies them when the graph first runs
            self.request = self.parent_model._compile_model(executed, self._device, self.ov_config, self._model_dir)
        else:
            super().compile()
