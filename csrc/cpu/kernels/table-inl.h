// What a target exports. Included last.
const KernelTable table = {
    .stats = stats,
    .choices = choices,
    .interleave = interleave,
    .errors = errors,
    .fit = fit,
    .encode = encode,
    .decode = decode,
    .decode_row = decode_row,
    .to_float = span_to_float,
    .from_float = span_from_float,
    .gemm_nt = gemm_nt,
    .gemm_nn = gemm_nn,
};
