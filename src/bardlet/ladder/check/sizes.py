"""The sizes of check's small models, and the names by which learners call them."""

from __future__ import annotations

from typing import Any, ClassVar

SIZES: dict[str, int | float] = {"n_embd": 48, "n_head": 3, "head_size": 16, "block_size": 20, "n_layer": 2,
                                 "batch_size": 5, "vocab_size": 60, "n_inner": 192, "dropout": 0.1}
"""Pairwise different, so that a mixed-up axis shows. n_embd also has room for 2, 4, 6 and 8 heads."""

NAMES = {
    "n_embd": "n_embd n_embed nembd d_model dmodel embed_dim embedding_dim emb_dim embed_size embedding_size emb_size "
              "hidden_size dim model_dim d_embed n_channels channels d_emb n_emb embd_dim embd input_dim in_dim d_in "
              "emb model_size width c d num_embed n_embeddings embeddings_dim dim_model embed_dims n_dim in_features "
              "embedding_dims hidden_dims d_embedding d_input nembed input_size in_size emb_dims e in_channels",
    "head_size": "head_size head_dim d_head d_k d_v dk dv dim_head hs d_key key_dim size head_sz attn_dim d_q d_value "
                 "hdim head_dims h_dim h_size d_h d_attn d_out out_dim output_dim out_features value_dim query_dim "
                 "k_dim head_width dim_k n_dim_head",
    "n_head": "n_head n_heads num_heads nheads heads h nhead num_attention_heads n_attn_heads number_of_heads "
              "head_count num_head head_num nh no_heads attention_heads n_kv_heads n_kv_head num_kv_heads "
              "kv_heads num_key_value_heads",
    "n_layer": "n_layer n_layers num_layers nlayers depth n_blocks num_blocks layers l n_block num_hidden_layers "
               "blocks nlayer no_layers number_of_layers num_layer layer_count block_count num_transformer_blocks",
    "block_size": "block_size context_length context_len ctx_len context_size context_window seq_len sequence_length "
                  "max_len max_seq_len max_sequence_length max_length n_ctx window window_size t seq_length "
                  "max_context max_position_embeddings n_positions ctx context block ctx_length max_seq_length "
                  "max_ctx blocksize ctx_size cntx_len max_block_size max_seq max_t sequence_len n_context "
                  "max_positions max_context_len max_context_length block_sz time_steps length bs_len input_len "
                  "window_len",
    "batch_size": "batch_size bs b batch batchsize",
    "vocab_size": "vocab_size n_vocab vocab v num_tokens n_tokens vocabulary_size num_embeddings vocab_len vocabsize "
                  "ntokens n_token vocab_sz voc_size num_vocab size_vocab dict_size n_vocabs token_count "
                  "src_vocab tgt_vocab src_vocab_size tgt_vocab_size source_vocab target_vocab vocab_src vocab_tgt",
    "n_inner": "d_ff ff_dim n_inner ffn_dim dim_feedforward mlp_dim ff_size d_hidden n_hidden intermediate_size "
               "inner_dim hidden_dim hidden ff_hidden ffn_hidden feedforward_dim feed_forward_dim d_inner "
               "hidden_features dff ff_hidden_dim d_mlp ffwd_dim ff_inner hidden_layer_size fc_dim ffn_size d_ffn "
               "hid_dim ff ff_width",
    "dropout": "dropout drop p_drop dropout_rate dropout_p dropout_prob drop_rate attn_dropout resid_dropout "
               "embd_pdrop attn_pdrop resid_pdrop p pdrop emb_dropout drop_prob attn_drop dropout_ratio ff_dropout "
               "res_dropout dropout_probability embed_dropout proj_drop drop_p do_rate attention_dropout "
               "dropout_value",
}
_SIZE_OF = {name: size for size, names in NAMES.items() for name in names.split()}

SUPPLIED = {
    "text", "raw_text", "corpus", "train_text", "chars", "vocab", "characters", "vocab_size", "data", "tokens",
    "train_data", "train_ids", "val_data", "val_ids", "valid_data", "test_data", "encode", "decode",
    "stoi", "char_to_idx", "char_to_int", "char2idx", "ch2i", "s2i",
    "itos", "idx_to_char", "int_to_char", "idx2char", "i2ch", "i2s"}
"""Names of a module that depend on the text: check supplies them."""


def size_of(name: str) -> str | None:
    """Return the size that a name means: block_size for ctx_len; None for any other name."""
    plain = name.strip("_").lower()
    if plain in _SIZE_OF:
        return _SIZE_OF[plain]
    for prefix in ("n_", "num_", "the_", "my_", "model_", "gpt_", "cfg_"):
        if plain.startswith(prefix) and plain.removeprefix(prefix) in _SIZE_OF and len(plain.removeprefix(prefix)) > 3:
            return _SIZE_OF[plain.removeprefix(prefix)]
    return None


def value_of(size: str | None) -> int | float:
    """Return the value of a size in check's models."""
    return SIZES[size or ""]


class Settings(dict[str, Any]):
    """A configuration that knows every size by any of its names, as an attribute and as an element."""

    OTHER: ClassVar[dict[str, Any]] = {
        "bias": False, "qkv_bias": False, "use_bias": False, "device": "cpu", "causal": True, "is_causal": True,
        "eps": 1e-5, "layer_norm_eps": 1e-5, "norm_eps": 1e-5, "layer_norm_epsilon": 1e-5, "tie_weights": False,
        "weight_tying": False, "flash": False, "seed": 1337, "learning_rate": 1e-3, "lr": 1e-3, "max_iters": 100,
        "eval_interval": 50, "eval_iters": 2, "dtype": None, "init_std": 0.02}

    def __missing__(self, name: str) -> Any:
        size = size_of(name)
        if size:
            return value_of(size)
        if name in self.OTHER:
            return self.OTHER[name]
        raise KeyError(name)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting; `default` for an unknown name."""
        try:
            return self[name]
        except KeyError:
            return default
