// Every operator schema of mixhead on one page. The kernels are registered in the folder of each
// op.
#include <torch/library.h>

TORCH_LIBRARY(mixhead, m) {
  m.def(
      "mixed_attention(Tensor query, Tensor key, Tensor value, Tensor memory_key, "
      "Tensor memory_value, Tensor mix, *, str rule=\"gate\", Tensor? attn_mask=None, "
      "Tensor? memory_mask=None, Tensor? memory_index=None, float dropout_p=0.0, "
      "bool is_causal=False, float? scale=None, bool enable_gqa=False) "
      "-> (Tensor output, Tensor self_lse, Tensor memory_lse)",
      {at::Tag::nondeterministic_seeded, at::Tag::pt2_compliant_tag});
  m.def(
      "merge_attention(Tensor[] outputs, Tensor[] lses) -> (Tensor output, Tensor lse)",
      {at::Tag::pt2_compliant_tag});

  // What autograd calls below mixed_attention. The seed makes dropout a pure function. With
  // for_backward the last two are what the backward reads, in the dtype of the log-sum-exps, as a
  // rounded output would cost the gradients precision: for the gate the outputs over each side
  // alone; for "joint", where output is rounded, self_output is output before rounding (composed on
  // CUDA: the memory's output). Otherwise they are empty.
  m.def(
      "_mixed_attention_forward(Tensor query, Tensor key, Tensor value, Tensor memory_key, "
      "Tensor memory_value, Tensor mix, str rule, Tensor? attn_mask, Tensor? memory_mask, "
      "Tensor? memory_index, float dropout_p, Tensor? seed, bool is_causal, float? scale, "
      "bool enable_gqa, bool for_backward=True) -> (Tensor output, Tensor self_lse, "
      "Tensor memory_lse, Tensor self_output, Tensor memory_output)",
      {at::Tag::pt2_compliant_tag});
  // Gradients of (query, key, value, memory_key, memory_value, mix, attn_mask, memory_mask); one
  // that output_mask does not ask for is an empty tensor.
  m.def(
      "_mixed_attention_backward(Tensor grad_output, Tensor grad_self_lse, Tensor grad_memory_lse, "
      "Tensor query, Tensor key, Tensor value, Tensor memory_key, "
      "Tensor memory_value, Tensor mix, str rule, Tensor? attn_mask, Tensor? memory_mask, "
      "Tensor? memory_index, float dropout_p, Tensor? seed, bool is_causal, float? scale, "
      "bool enable_gqa, Tensor output, Tensor self_lse, Tensor memory_lse, "
      "Tensor self_output, Tensor memory_output, bool[8] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});

  m.def(
      "kernel_attention(Tensor query, Tensor key, Tensor value, Tensor? bandwidth, str[] kernel, "
      "*, "
      "Tensor? attn_mask=None, bool is_causal=False, bool exclude_self=False, "
      "bool normalize=True, str empty=\"zero\", float dropout_p=0.0, bool enable_gqa=False) "
      "-> (Tensor output, Tensor log_mass)",
      {at::Tag::nondeterministic_seeded, at::Tag::pt2_compliant_tag});
  m.def(
      "_kernel_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bandwidth, "
      "str[] kernel, Tensor? attn_mask, bool is_causal, bool exclude_self, bool normalize, "
      "str empty, float dropout_p, Tensor? seed, bool enable_gqa) "
      "-> (Tensor output, Tensor log_mass)",
      {at::Tag::pt2_compliant_tag});
  // Gradients of (query, key, value, bandwidth, attn_mask); empty where not asked for.
  m.def(
      "_kernel_attention_backward(Tensor grad_output, Tensor grad_log_mass, Tensor query, "
      "Tensor key, Tensor value, Tensor? bandwidth, str[] kernel, Tensor? attn_mask, "
      "bool is_causal, bool exclude_self, bool normalize, str empty, float dropout_p, "
      "Tensor? seed, bool enable_gqa, Tensor output, Tensor log_mass, bool[5] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  // Blocks of keys past panels of rows that the last forward on the CPU read, and skipped because
  // they lay outside the support of a compact kernel.
  m.def("_kernel_attention_blocks() -> (int read, int skipped)");
  // The weights (B, Hq, L, S) themselves, which no other operator stores, for who looks at them.
  m.def(
      "_kernel_attention_weights(Tensor query, Tensor key, Tensor log_mass, Tensor? bandwidth, "
      "str[] kernel, Tensor? attn_mask, bool is_causal, bool enable_gqa) -> Tensor",
      {at::Tag::pt2_compliant_tag});

  m.def(
      "local_linear_attention(Tensor query, Tensor key, Tensor value, Tensor? bandwidth, "
      "str[] kernel, *, Tensor? attn_mask=None, bool is_causal=False, bool exclude_self=False, "
      "float ridge=0.0) -> (Tensor output, Tensor slope, Tensor leverage, Tensor log_mass)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_local_linear_attention_forward(Tensor query, Tensor key, Tensor value, "
      "Tensor? bandwidth, str[] kernel, Tensor? attn_mask, bool is_causal, bool exclude_self, "
      "float ridge) -> (Tensor output, Tensor slope, Tensor leverage, Tensor log_mass)",
      {at::Tag::pt2_compliant_tag});
  // Gradients of (query, key, value, bandwidth, attn_mask); empty where not asked for.
  m.def(
      "_local_linear_attention_backward(Tensor grad_output, Tensor grad_slope, "
      "Tensor grad_leverage, Tensor grad_log_mass, Tensor query, Tensor key, Tensor value, "
      "Tensor? bandwidth, str[] kernel, Tensor? attn_mask, bool is_causal, bool exclude_self, "
      "float ridge, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});

  m.def(
      "topk_keys(Tensor query, Tensor key, int k, *, Tensor? mask=None, str metric=\"dot\") "
      "-> (Tensor scores, Tensor indices)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_topk_keys_forward(Tensor query, Tensor key, int k, Tensor? mask, str metric) "
      "-> (Tensor scores, Tensor indices)",
      {at::Tag::pt2_compliant_tag});
  // Gradients of (query, key, mask); empty where not asked for.
  m.def(
      "_topk_keys_backward(Tensor grad_scores, Tensor query, Tensor key, Tensor? mask, "
      "str metric, Tensor indices, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});

  m.def(
      "matching_attention(Tensor query, Tensor key, Tensor value, Tensor? bandwidth, "
      "str[] kernel, *, Tensor? row_mass=None, Tensor? column_mass=None, Tensor? dustbin=None, "
      "int iterations=50, float tolerance=1e-6) "
      "-> (Tensor output, Tensor row_potential, Tensor column_potential)",
      {at::Tag::pt2_compliant_tag});
  // The column potentials after Sinkhorn's iterations, and the linear system of their derivative;
  // matching_attention is these and calls of kernel_attention. Each side ends with its dustbin
  // where there is one.
  m.def(
      "_matching_attention_sinkhorn(Tensor query, Tensor key, Tensor? bandwidth, str[] kernel, "
      "Tensor? dustbin, Tensor log_row_mass, Tensor log_column_mass, int iterations, "
      "float tolerance) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_matching_attention_solve(Tensor query, Tensor key, Tensor? bandwidth, str[] kernel, "
      "Tensor? dustbin, Tensor row_potential, Tensor column_potential, Tensor right_side) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
}
