//! Against the safetensors crate, and against chance.

use proptest::prelude::*;

use super::headers::bytes_at;
use super::*;

/// The invariant that the rest of the library builds on.
fn assert_sound(checkpoint: &Checkpoint) {
    let mut end = 0;
    let mut shard = usize::MAX;
    for (i, tensor) in checkpoint.tensors().iter().enumerate() {
        assert_eq!(tensor.dtype.tensor_bytes(&tensor.shape), Some(tensor.bytes));
        if tensor.shard != shard {
            (shard, end) = (tensor.shard, 0);
        }
        assert!(tensor.offset >= end);
        end = tensor.range().end;
        assert!(end <= checkpoint.shards()[shard].length());
        assert_eq!(checkpoint.find(&tensor.name), Some(i));
        let mut bytes = vec![0; tensor.bytes as usize];
        checkpoint.read_tensor(i, 0, &mut bytes).unwrap();
    }
    let bytes: u64 = checkpoint.tensors().iter().map(|tensor| tensor.bytes).sum();
    assert_eq!(bytes, checkpoint.source_bytes());
}

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, CheckpointError> {
    let dir = dir();
    // On Windows the open file keeps the directory from being removed, which is ignored there.
    Checkpoint::open(write(&dir, "model.safetensors", bytes))
}

#[derive(Debug, Clone)]
struct Tensor {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

fn tensor() -> impl Strategy<Value = Tensor> {
    use safetensors::Dtype as D;
    let dtypes = [
        D::BOOL,
        D::F4,
        D::U8,
        D::I16,
        D::F16,
        D::BF16,
        D::F32,
        D::C64,
        D::F8_E4M3,
        D::I64,
    ];
    let shape = prop::collection::vec(0usize..5, 0..4);
    (prop::sample::select(dtypes.to_vec()), shape).prop_map(|(dtype, mut shape)| {
        shape.push(2); // so that 4-bit elements fill bytes
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let data = (0..bytes).map(|i| (i * 7) as u8).collect();
        Tensor { dtype, shape, data }
    })
}

fn serialized() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::btree_map("[a-z.\"é]{1,12}", tensor(), 0..8).prop_map(|tensors| {
        let views = tensors.iter().map(|(name, t)| {
            let view = safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), &t.data);
            (name, view.unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn files_of_the_safetensors_crate_are_read_equal(bytes in serialized()) {
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let ours = open_bytes(&bytes).unwrap();
        assert_sound(&ours);
        prop_assert_eq!(ours.tensors().len(), theirs.len());
        for (i, info) in ours.tensors().iter().enumerate() {
            let view = theirs.tensor(&info.name).unwrap();
            let shape: Vec<u64> = view.shape().iter().map(|&n| n as u64).collect();
            prop_assert_eq!(&info.shape, &shape);
            prop_assert_eq!(info.dtype.safetensors_name(), view.dtype().to_string());
            let mut data = vec![0; info.bytes as usize];
            ours.read_tensor(i, 0, &mut data).unwrap();
            prop_assert_eq!(&data[..], view.data());
        }
    }

    #[test]
    fn damaged_files_never_panic_and_what_is_accepted_is_sound(
        mut bytes in serialized(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 1..6),
    ) {
        for (index, byte, kind) in damage {
            let at = index.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => { bytes.remove(at); }
            }
        }
        if let Ok(checkpoint) = open_bytes(&bytes) {
            assert_sound(&checkpoint);
            // We accept nothing that the reference implementation refuses.
            prop_assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
        }
    }

    #[test]
    fn headers_with_other_digits_never_panic_and_what_is_accepted_is_sound(
        bytes in serialized(),
        digits in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 1..4),
    ) {
        let mut bytes = bytes;
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let at: Vec<usize> = (8..end).filter(|&i| bytes[i].is_ascii_digit()).collect();
        for (index, digit) in digits {
            if !at.is_empty() {
                bytes[at[index.index(at.len())]] = digit;
            }
        }
        if let Ok(checkpoint) = open_bytes(&bytes) {
            assert_sound(&checkpoint);
            prop_assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), json in ".*") {
        let _ = open_bytes(&bytes);
        let _ = open_bytes(&file(&format!("{{{json}}}"), 0));
        let _ = index::parse(Path::new("i"), &json, &CancelToken::new());
        let _ = Config::parse(Path::new("c"), json);
    }

    #[test]
    fn random_offsets_are_accepted_exactly_when_they_tile(
        offsets in prop::collection::vec((0u64..6, 0u64..4), 0..4),
        data in 0usize..8,
    ) {
        let offsets: Vec<(u64, u64)> = offsets.iter().map(|(b, n)| (*b, b + n)).collect();
        let bytes = file(&bytes_at(&offsets), data);
        let theirs = safetensors::SafeTensors::deserialize(&bytes);
        prop_assert_eq!(open_bytes(&bytes).is_ok(), theirs.is_ok());
    }
}
