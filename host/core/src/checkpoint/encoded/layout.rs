//! How many elements share a scale, as the shapes say.

/// What the shape of scales says of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiles {
    /// Rows of one matrix.
    pub(super) rows: u64,
    /// Rows and columns of a tile; `u64::MAX` for all.
    pub(super) tile: [u64; 2],
}

/// All of a row, a column, a matrix.
const ALL: u64 = u64::MAX;

/// The tiles of a weight of this shape, with two dimensions or more, none of which is 0, that scales of
/// this shape are for. Blocks are those of the configuration if they fit, else 128 x 128 if these do,
/// else equal ones. `None` for shapes that do not belong together.
pub(super) fn tiles(shape: &[u64], scales: &[u64], block: Option<[u64; 2]>) -> Option<Tiles> {
    let [stack @ .., rows, columns] = shape else {
        return None;
    };
    let (rows, columns) = (*rows, *columns);
    let all_rows = stack.iter().try_fold(rows, |n, &d| n.checked_mul(d))?;
    if all_rows == 0 || columns == 0 {
        return None;
    }
    if scales.iter().all(|&dimension| dimension == 1) {
        return Some(Tiles {
            rows: all_rows,
            tile: [ALL, ALL],
        });
    }
    let of = |tile| Some(Tiles { rows, tile });
    let leading = &shape[..shape.len() - 1];
    if scales == leading {
        return of([1, ALL]);
    }
    if !stack.is_empty() && scales == stack {
        return of([ALL, ALL]);
    }
    let [scale_stack @ .., scale_rows, scale_columns] = scales else {
        return None;
    };
    if scale_stack != stack {
        return None;
    }
    let (scale_rows, scale_columns) = (*scale_rows, *scale_columns);
    let fits = |[tile_rows, tile_columns]: &[u64; 2]| {
        *tile_rows > 0
            && *tile_columns > 0
            && rows.div_ceil(*tile_rows) == scale_rows
            && columns.div_ceil(*tile_columns) == scale_columns
    };
    if let Some(block) = block.filter(fits) {
        return of(block);
    }
    match (scale_rows, scale_columns) {
        (1, 1) => return of([ALL, ALL]),
        (_, 1) if scale_rows == rows => return of([1, ALL]),
        _ => {}
    }
    if fits(&[128, 128]) {
        return of([128, 128]);
    }
    let divides = |n: u64, parts: u64| parts > 0 && n.is_multiple_of(parts);
    (divides(rows, scale_rows) && divides(columns, scale_columns))
        .then(|| [rows / scale_rows, columns / scale_columns])
        .and_then(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_of_scales_say_what_shares_one() {
        let of = |rows, tile| Some(Tiles { rows, tile });
        let block = [128, 128];
        for (shape, scales, config, tiles) in [
            (&[256, 384][..], &[2, 3][..], None, of(256, block)),
            // DeepSeek's latent projection: the last tiles are smaller.
            (&[576, 7168], &[5, 56], Some(block), of(576, block)),
            (&[576, 7168], &[5, 56], None, of(576, block)),
            (&[256, 384], &[4, 6], Some([64, 64]), of(256, [64, 64])),
            // A configuration that is for others.
            (&[256, 384], &[256, 12], Some(block), of(256, [1, 32])),
            (&[256, 384], &[], None, of(256, [ALL, ALL])),
            (&[256, 384], &[1], None, of(256, [ALL, ALL])),
            (&[256, 384], &[1, 1], Some(block), of(256, [ALL, ALL])),
            (&[256, 384], &[256], None, of(256, [1, ALL])),
            (&[256, 384], &[256, 1], None, of(256, [1, ALL])),
            (&[4, 256, 384], &[4, 2, 3], Some(block), of(256, block)),
            (&[4, 256, 384], &[4], None, of(256, [ALL, ALL])),
            (&[4, 256, 384], &[4, 1, 1], None, of(256, [ALL, ALL])),
            (&[4, 256, 384], &[4, 256], None, of(256, [1, ALL])),
            (&[4, 256, 384], &[4, 256, 1], None, of(256, [1, ALL])),
            (&[4, 256, 384], &[1], None, of(1024, [ALL, ALL])),
            (&[256, 384], &[3, 2], None, None),
            (&[256, 384], &[384], None, None),
            (&[256, 384], &[2, 2, 3], None, None),
            (&[4, 256, 384], &[3, 2, 3], None, None),
            (&[256, 384], &[0, 3], None, None),
            (&[0, 384], &[0, 3], None, None),
            (&[256, 0], &[2, 0], Some(block), None),
            (&[256, 384], &[2, 3], Some([0, 0]), of(256, block)),
            (&[u64::MAX, 3, 3], &[2, 3], None, None),
            (&[384], &[3], None, None),
        ] {
            let found = super::tiles(shape, scales, config);
            assert_eq!(found, tiles, "{shape:?} {scales:?} {config:?}");
        }
    }
}
