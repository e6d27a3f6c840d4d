// Every kernel, in terms of the names of the target's vec headers. Order matters: bodies first,
// then the table of them.
#include "cpu/kernels/parameters-inl.h"

#include "cpu/kernels/decode-inl.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/quantize-inl.h"
#include "cpu/kernels/search-inl.h"

#include "cpu/kernels/best_choice-inl.h"

#include "cpu/kernels/feedback-inl.h"
#include "cpu/kernels/hqq-inl.h"

#include "cpu/kernels/activations-inl.h"
#include "cpu/kernels/codecs-inl.h"
#include "cpu/kernels/scratch-inl.h"
#include "cpu/kernels/units-inl.h"

#include "cpu/kernels/tile-inl.h"

#include "cpu/kernels/shares-inl.h"

#include "cpu/kernels/panels-inl.h"
#include "cpu/kernels/rows-inl.h"

#include "cpu/kernels/dot_codes-inl.h"
#include "cpu/kernels/outliers-inl.h"

#include "cpu/kernels/table-inl.h"
