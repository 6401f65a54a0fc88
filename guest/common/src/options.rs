//! How structs of options are filled in where they may get more fields.

/// Gives a struct of options a method for each field that returns the same options with another value
/// of it.
///
/// ```
/// #[derive(Default)]
/// #[non_exhaustive]
/// pub struct Options {
///     pub threads: usize,
/// }
///
/// tightfit_common::setters!([] Options:
///     with_threads: threads, usize;
/// );
///
/// assert_eq!(Options::default().with_threads(3).threads, 3);
/// ```
#[macro_export]
macro_rules! setters {
    ([$($generics:tt)*] $options:ty: $($setter:ident: $field:ident, $of:ty;)*) => {
        impl $($generics)* $options {
            $(
                #[doc = concat!("Sets [`", stringify!($field), "`](Self::", stringify!($field), ").")]
                #[must_use]
                pub fn $setter(self, $field: $of) -> Self {
                    Self { $field, ..self }
                }
            )*
        }
    };
}
