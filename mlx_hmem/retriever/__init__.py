"""Text to cluster path: encoders, the cluster tree, and the retriever that joins them."""

from mlx_hmem.retriever.encoder import Encoder, load_encoder
from mlx_hmem.retriever.retriever import Retriever
from mlx_hmem.retriever.tree import ClusterTree

__all__ = ["ClusterTree", "Encoder", "Retriever", "load_encoder"]
