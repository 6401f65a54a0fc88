//! Systems without leases: there is no window.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;

use crate::checkpoint::{CheckpointError, Shard};

/// No mappings.
#[derive(Debug)]
pub(crate) struct Mappings;

/// No window.
#[derive(Debug)]
pub(crate) struct Window<'m>(Infallible, PhantomData<&'m Mappings>);

impl Mappings {
    pub(super) fn new(_: Arc<[Shard]>, _: bool) -> Mappings {
        Mappings
    }

    pub(crate) fn window(&self, _shard: usize, _offset: u64, _length: usize) -> Option<Window<'_>> {
        None
    }
}

impl Window<'_> {
    pub(crate) fn finish(self) -> Result<(), CheckpointError> {
        match self.0 {}
    }
}

impl Deref for Window<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self.0 {}
    }
}
