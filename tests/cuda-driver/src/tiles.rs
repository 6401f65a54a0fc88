//! Descriptions of matrices for a GPU's copy engine.

use std::ffi::c_void;
use std::slice;

use tightfit_kernels::cuda::linear::TileMap;

use crate::books::{Books, Kind, call};
use crate::kernels::{Parameters, Passed};

/// What the stand-in has in a `CUtensorMap`: that it is one, the address, and what an
/// [emulator's map](tightfit_cuda_emulator::Argument::Map) has.
type Fields = [u64; 16];
const MARK: u64 = 0x7469_6c65_206d_6170;

/// Elements that a tile has in each dimension at most.
const LONGEST: u32 = 256;

/// `cuTensorMapEncodeTiled`, of two dimensions.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuTensorMapEncodeTiled(
    map: *mut Fields,
    element: u32,
    dimensions: u32,
    address: *mut c_void,
    extents: *const u64,
    strides: *const u64,
    tile: *const u32,
    element_strides: *const u32,
    interleave: u32,
    swizzle: u32,
    promotion: u32,
    filling: u32,
) -> u32 {
    call(
        "cuTensorMapEncodeTiled",
        Kind::Takes,
        |books: &mut Books| {
            if dimensions != 2 || element > 1 {
                return Err(books.fault(format!(
                    "a map of {dimensions} dimensions of elements {element}"
                )));
            }
            // SAFETY: the caller's arrays, of as many numbers as there are dimensions, or one less.
            let (extents, tile, element_strides) = unsafe {
                (
                    slice::from_raw_parts(extents, 2),
                    slice::from_raw_parts(tile, 2),
                    slice::from_raw_parts(element_strides, 2),
                )
            };
            // SAFETY: as above.
            let row_bytes = unsafe { strides.read() };
            let bytes = u64::from(element) + 1;
            let pattern = 16 << swizzle;
            let is_right = (map as usize).is_multiple_of(64)
                && (address as u64).is_multiple_of(16)
                && row_bytes.is_multiple_of(16)
                && row_bytes < 1 << 40
                && extents.iter().all(|extent| (1..=1 << 32).contains(extent))
                && tile.iter().all(|length| (1..=LONGEST).contains(length))
                && (u64::from(tile[0]) * bytes).is_multiple_of(16)
                && (1..=3).contains(&swizzle)
                && u64::from(tile[0]) * bytes <= pattern
                && element_strides == [1, 1]
                && (interleave, filling) == (0, 0)
                && promotion <= 3;
            if !is_right {
                return Err(books.fault(format!(
                "a map at {map:?} of {address:?}: {extents:?}, {row_bytes} bytes a row, {tile:?}, {swizzle}"
            )));
            }
            let [tile_columns, tile_rows] = [tile[0], tile[1]].map(u64::from);
            let mut fields = [0; 16];
            fields[..9].copy_from_slice(&[
                MARK,
                address as u64,
                bytes,
                extents[0],
                extents[1],
                row_bytes,
                tile_columns,
                tile_rows,
                pattern,
            ]);
            // SAFETY: the caller's map, of 128 bytes.
            unsafe { map.write(fields) };
            Ok(())
        },
    )
}

/// The map that is argument `index`, which has to be `expected` of what argument `of` points to.
pub(crate) fn map(
    parameters: Parameters,
    index: usize,
    of: usize,
    expected: &TileMap,
) -> Result<Passed, String> {
    let [mark, address, numbers @ ..] = parameters.map(index);
    let [a, b, c, d, e, f, g, ..] = numbers;
    let numbers = [a, b, c, d, e, f, g];
    let TileMap {
        element_bytes,
        columns,
        rows,
        row_bytes,
        tile,
        swizzle,
    } = *expected;
    let [element_bytes, tile_columns, tile_rows, swizzle] =
        [element_bytes, tile[0], tile[1], swizzle].map(u64::from);
    let need = [
        element_bytes,
        columns,
        rows,
        row_bytes,
        tile_columns,
        tile_rows,
        swizzle,
    ];
    if (mark, address, numbers) != (MARK, parameters.u64(of), need) {
        return Err(format!(
            "the map of argument {of} at {:#x} is {numbers:?} at {address:#x}, not {need:?}",
            parameters.u64(of)
        ));
    }
    Ok(Passed::Map { of, numbers })
}
