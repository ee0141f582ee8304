/* What arrays beside the kernels' own elements may hold. */
#ifndef FASTBN_STORED_H
#define FASTBN_STORED_H

enum stored {
    STORED_ELEMENT, /* what the kernels are compiled for */
    STORED_UINT8,
    STORED_INT8,
    STORED_UINT16,
    STORED_INT16,
    STORED_FLOAT16,
    STORED_BFLOAT16
};

#endif
