// What a target exports. Included last.
const KernelTable table = {
    .stats = stats,
    .error_grid = error_grid,
    .error_codebook = error_codebook,
    .fit_grid = fit_grid,
    .fit_codebook = fit_codebook,
    .encode_grid = encode_grid,
    .encode_codebook = encode_codebook,
    .decode = decode,
    .to_float = span_to_float,
    .from_float = span_from_float,
    .gemm_nt = gemm_nt,
    .gemm_nn = gemm_nn,
};
