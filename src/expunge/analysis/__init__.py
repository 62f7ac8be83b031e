"""Looking into a classifier: embeddings, joint t-SNE, and Wasserstein distances between class clouds.

Everything is computed from :class:`Embedding` files, so pictures of several models always show the same samples.
"""

from __future__ import annotations

from expunge.analysis.embed import embed, embed_weights
from expunge.analysis.embedding import Embedding, load_folder
from expunge.analysis.section import analysis_section
from expunge.analysis.tsne import Projection, tsne
from expunge.analysis.wasserstein import (
    Distances,
    w1,
    wasserstein_between,
    wasserstein_difference,
    wasserstein_matrix,
)

__all__ = [
    "Distances",
    "Embedding",
    "Projection",
    "analysis_section",
    "embed",
    "embed_weights",
    "load_folder",
    "tsne",
    "w1",
    "wasserstein_between",
    "wasserstein_difference",
    "wasserstein_matrix",
]
